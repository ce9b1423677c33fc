"""A router that learns although its choice is hard: the gated straight-through estimator.

Where the gate renormalises, the weight of a single choice is p / p = 1: the loss has no gradient to
the router, only rounding noise, which Adam would amplify to full steps. Instead, with m the mask of
the choice and sg() stopping the gradient,

    g = sg(p) m + p - sg(p),     weight = g / sum g:

forwards exactly the hard choice, backwards every expert's output speaks:
d weight_j = (dp_j - m_j sum dp) / p_chosen.

Legend: T tokens, E experts, K experts per token, M candidates (the chosen first, then the likeliest others).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from moesurgeon.engine.model import MoeBlock, moe_blocks
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from moesurgeon.errors import CheckpointError
from moesurgeon.surgery.anatomy import Anatomy


def straight_through(
    routing: Routing, scores_TE: torch.Tensor, chosen_TK: torch.Tensor, candidates_TM: torch.Tensor
) -> torch.Tensor:
    """Return the weights [T, M] of the candidates: those of the hard choice, with a dense gradient."""
    p = scores_TE.gather(-1, candidates_TM)
    mask = (candidates_TM[:, :, None] == chosen_TK[:, None, :]).any(-1)
    gated = p.detach() * mask + (p - p.detach())
    if routing.renormalises:
        gated = gated / (gated.sum(-1, keepdim=True) + routing.epsilon)
    return gated * routing.scale


@dataclass(frozen=True, slots=True)
class Routed:
    """What one router made of T tokens: ``logits`` [T, E] with their gradient, ``chosen`` [T, K]."""

    logits: torch.Tensor
    chosen: torch.Tensor


@contextmanager
def learning_routers(model: PreTrainedModel, anatomy: Anatomy, *, candidates: int | None) -> Iterator[list[Routed]]:
    """Inside the context, routers pass gradients for all (or the likeliest ``candidates``) experts.

    The model computes what it computed before; only gradients are new. Yields a list that each forward
    pass under gradients fills, router by router, for a balancing loss; the caller clears it.
    """
    routing = routing_of(anatomy)
    routed: list[Routed] = []
    candidates = min(candidates or anatomy.experts, anatomy.experts)
    since = anatomy.family.trained_since
    if since is not None and Version(transformers.__version__) < Version(since):
        raise CheckpointError(
            f"transformers {transformers.__version__} lays the router of {anatomy.family.title} out otherwise than "
            f"{since}, so that it cannot be trained; update transformers"
        )
    blocks = moe_blocks(model, anatomy)
    originals = [block.router.forward for block in blocks]
    for block in blocks:
        block.router.forward = _forward(block, routing, anatomy.top_k, candidates, routed)
    try:
        yield routed
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.router.forward = original


def _forward(
    block: MoeBlock, routing: Routing, top_k: int, candidates: int, routed: list[Routed]
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    router: nn.Module = block.router

    def forward(hidden_states: torch.Tensor, *_bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight: torch.Tensor = router.weight  # type: ignore[assignment]
        flat = hidden_states.reshape(-1, hidden_states.shape[-1]).to(weight.dtype)
        logits_TE = F.linear(flat, weight)
        scores_TE = routing.scores(logits_TE)
        chosen_TK = routing.choose(scores_TE.detach(), selection_bias(block), top_k)
        learns = torch.is_grad_enabled()  # a pass that only judges runs the chosen experts alone
        if learns:
            routed.append(Routed(logits_TE, chosen_TK))
        if candidates <= top_k or not learns:
            return logits_TE, routing.weights(scores_TE, chosen_TK).to(hidden_states.dtype), chosen_TK
        # The chosen first, then the others by score: their weight is zero, their gradient is not.
        rest = scores_TE.detach().scatter(-1, chosen_TK, -1.0).topk(candidates - top_k, dim=-1).indices
        candidates_TM = torch.cat([chosen_TK, rest], dim=-1)
        weights_TM = straight_through(routing, scores_TE, chosen_TK, candidates_TM)
        return logits_TE, weights_TM.to(hidden_states.dtype), candidates_TM

    return forward
