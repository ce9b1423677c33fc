"""Watching the mixture-of-experts blocks of a running model.

What is recorded is what the block used: the router's own logits as it returns them, and the indices
and weights as the experts receive them. The experts' outputs are computed once, in the way of the
stock eager implementation, and their norms taken before they are weighted and summed.

Legend: T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from moesurgeon.engine.model import MoeBlock
from moesurgeon.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Observation:
    """One block's forward pass over T tokens (padding included).

    ``logits`` [T, E], ``indices`` and ``weights`` [T, K], ``norms`` [T, K]: the length of each chosen
    expert's output before weighting; ``inputs`` and ``output`` [T, H] of the routed experts, ``result``
    [T, H] of the whole block, shared experts included.
    """

    layer: int
    logits: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    norms: torch.Tensor
    inputs: torch.Tensor
    output: torch.Tensor
    result: torch.Tensor


Visitor = Callable[[MoeBlock, Observation], None]


@contextmanager
def observed(blocks: Sequence[MoeBlock], visit: Visitor) -> Iterator[None]:
    """Call ``visit`` for every block of every forward pass inside the context."""
    handles, originals = [], []
    try:
        for block in blocks:
            seen: dict[str, torch.Tensor] = {}
            handles.append(block.router.register_forward_hook(_keep_logits(seen)))
            handles.append(block.module.register_forward_hook(_visiting(block, seen, visit)))
            originals.append((block.experts, block.experts.forward))
            block.experts.forward = _watching(block, seen)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for experts, original in originals:
            experts.forward = original


def expert_outputs(
    experts: nn.Module, inputs_TH: torch.Tensor, indices_TK: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield, per expert with tokens: its number, the tokens, their ranks, its outputs [n, H] unweighted.

    Each expert runs on the tokens that it was given and on no others, in their order. Tokens are sorted by expert
    once: asking for each expert anew where it is takes 40 x as long for 256 of them.
    """
    parts: Any = experts
    flat = indices_TK.flatten()
    counts = torch.bincount(flat).tolist()
    order = flat.to(torch.int16).argsort(stable=True)
    tokens, ranks = order // indices_TK.shape[-1], order % indices_TK.shape[-1]
    start = 0
    for expert, count in enumerate(counts):
        if count:
            token, rank = tokens[start : start + count], ranks[start : start + count]
            start += count
            gate, up = nn.functional.linear(inputs_TH.index_select(0, token), parts.gate_up_proj[expert]).chunk(
                2, dim=-1
            )
            yield expert, token, rank, nn.functional.linear(parts.act_fn(gate) * up, parts.down_proj[expert])


def replays(block: MoeBlock, seen: Observation, stock: Callable[..., torch.Tensor] | None = None) -> bool:
    """Tell whether the block's own experts (or ``stock``), given the recorded routing, give the recorded output."""
    # The instance's forward is ours while it is observed.
    again = (stock or partial(type(block.experts).forward, block.experts))(seen.inputs, seen.indices, seen.weights)
    scale = seen.output.float().pow(2).mean().sqrt()
    tolerance = 1e-5 if seen.output.dtype == torch.float32 else 3e-2
    return bool((again.float() - seen.output.float()).pow(2).mean().sqrt() <= tolerance * scale)


def logits_in(output: Any) -> torch.Tensor:
    """Return the logits [T, E] in what a router returns.

    Mostly (logits, weights, indices). Before transformers 5.23 Granite's returns (indices, weights, logits) and
    Jamba's the logits alone.
    """
    if isinstance(output, torch.Tensor):
        return output
    logits: torch.Tensor = output[0] if output[0].is_floating_point() else output[-1]
    return logits


def _keep_logits(seen: dict[str, torch.Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen["logits"] = logits_in(output)

    return hook


def _visiting(block: MoeBlock, seen: dict[str, torch.Tensor], visit: Visitor) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        visit(block, Observation(block.layer, **seen, result=result.reshape(-1, result.shape[-1])))
        seen.clear()

    return hook


def _watching(block: MoeBlock, seen: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    for name in ("gate_up_proj", "down_proj", "act_fn"):
        if not hasattr(block.experts, name):
            raise CheckpointError(f"{type(block.experts).__name__} has no {name}: this family cannot be profiled yet")

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        norms = torch.zeros(top_k_index.shape, dtype=torch.float32, device=hidden_states.device)
        places = []
        for _expert, token, rank, out in expert_outputs(block.experts, hidden_states, top_k_index):
            places.append((token, rank, torch.linalg.vector_norm(out, dim=-1, dtype=torch.float32)))
            output.index_add_(0, token, (out * top_k_weights[token, rank, None]).to(output.dtype))
        if places:  # all at once: sixteen small writes take longer
            tokens, ranks, lengths = map(torch.cat, zip(*places, strict=True))
            norms[tokens, ranks] = lengths
        seen.update(indices=top_k_index, weights=top_k_weights, norms=norms, inputs=hidden_states, output=output)
        return output

    return forward
