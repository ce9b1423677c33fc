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
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from moesurgeon.engine.model import MoeBlock, moe_blocks
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from moesurgeon.errors import CheckpointError
from moesurgeon.recovery.capacity import within_capacity
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


LINEAR = "linear"
"""The child of a router that makes its logits, if it has one: what wants a Linear layer finds it there."""


@dataclass(frozen=True, slots=True)
class Routed:
    """What one router made of T tokens: ``logits`` [T, E] with their gradient, ``chosen`` [T, K]."""

    logits: torch.Tensor
    chosen: torch.Tensor


Watch = Callable[[int, torch.Tensor], None]
"""Is told, of every pass without gradients, the layer and what its router chose [T, K]."""


class Learning:
    """How the routers of a model work inside :func:`learning_routers`.

    ``routed``: what they made of the last passes under gradients (of all passes while it ``records``), router by
    router; who reads it clears it. ``capacity``: factor beyond which choices are dropped while training, of the
    tokens that ``is_text`` [T] says are text. ``rehearses``: passes without gradients are as those with them.
    """

    def __init__(self, anatomy: Anatomy, candidates: int | None, capacity: float | None) -> None:
        self.rule, self.top_k = routing_of(anatomy), anatomy.top_k
        self.candidates = min(candidates or anatomy.experts, anatomy.experts)
        self.routed: list[Routed] = []
        self.records = False
        self.watch: Watch | None = None
        self.capacity = capacity
        self.is_text: torch.Tensor | None = None
        self.rehearses = False

    @contextmanager
    def routing_as(self, anatomy: Anatomy) -> Iterator[None]:
        """Inside the context tokens go to as many experts, and are weighted, as ``anatomy`` says."""
        before = self.rule, self.top_k
        self.rule, self.top_k = routing_of(anatomy), anatomy.top_k
        try:
            yield
        finally:
            self.rule, self.top_k = before

    @contextmanager
    def recording(self) -> Iterator[list[Routed]]:
        """Inside the context passes without gradients are taken down as well, in a list of their own."""
        before = self.routed, self.records
        self.routed, self.records = [], True
        try:
            yield self.routed
        finally:
            self.routed, self.records = before

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Inside the context ``watch`` is told what is chosen."""
        self.watch = watch
        try:
            yield
        finally:
            self.watch = None


@contextmanager
def learning_routers(
    model: PreTrainedModel, anatomy: Anatomy, *, candidates: int | None, capacity: float | None = None
) -> Iterator[Learning]:
    """Inside the context, routers pass gradients for all (or the likeliest ``candidates``) experts.

    The model computes what it computed before, but for what ``capacity`` drops under gradients; only gradients are
    new.
    """
    learning = Learning(anatomy, candidates, capacity)
    since = anatomy.family.trained_since
    if since is not None and Version(transformers.__version__) < Version(since):
        raise CheckpointError(
            f"transformers {transformers.__version__} lays the router of {anatomy.family.title} out otherwise than "
            f"{since}, so that it cannot be trained; update transformers"
        )
    blocks = moe_blocks(model, anatomy)
    originals = [block.router.forward for block in blocks]
    for block in blocks:
        block.router.forward = _forward(block, learning)
    try:
        yield learning
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.router.forward = original


def _forward(
    block: MoeBlock, learning: Learning
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    router: nn.Module = block.router

    def forward(hidden_states: torch.Tensor, *_bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight: torch.Tensor = router.weight  # type: ignore[assignment]
        rule, top_k, dtype = learning.rule, learning.top_k, hidden_states.dtype
        flat = hidden_states.reshape(-1, hidden_states.shape[-1]).to(weight.dtype)
        linear: Any = router._modules.get(LINEAR)
        if linear is not None and weight is not linear.weight:
            linear.get_base_layer().weight = weight  # a layer that was read anew
        logits_TE = F.linear(flat, weight) if linear is None else linear(flat)
        scores_TE = rule.scores(logits_TE)
        chosen_TK = rule.choose(scores_TE.detach(), selection_bias(block), top_k)
        learns = torch.is_grad_enabled() or learning.rehearses  # a pass that only judges runs the chosen experts alone
        if learns or learning.records:
            learning.routed.append(Routed(logits_TE, chosen_TK))
        if not learns:
            if learning.watch:
                learning.watch(block.layer, chosen_TK)
            return logits_TE, rule.weights(scores_TE, chosen_TK).to(dtype), chosen_TK
        candidates_TM = chosen_TK
        if learning.candidates <= top_k:
            weights_TM = rule.weights(scores_TE, chosen_TK)
        else:
            # The chosen first, then the others by score: their weight is zero, their gradient is not.
            rest = scores_TE.detach().scatter(-1, chosen_TK, -1.0).topk(learning.candidates - top_k, dim=-1).indices
            candidates_TM = torch.cat([chosen_TK, rest], dim=-1)
            weights_TM = straight_through(rule, scores_TE, chosen_TK, candidates_TM)
        if learning.capacity is not None:
            # What is dropped is heard no more; the others stay to say where the token had better gone.
            assert learning.is_text is not None
            kept_TK = within_capacity(chosen_TK, learning.is_text, logits_TE.shape[-1], learning.capacity)
            weights_TM = weights_TM * F.pad(kept_TK, (0, candidates_TM.shape[-1] - top_k), value=True)
        return logits_TE, weights_TM.to(dtype), candidates_TM

    return forward
