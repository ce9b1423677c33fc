"""Closed-form refits of down projections: the one part of an expert in which its output is linear.

For expert e with hidden activations h [F] and gate weight w on the tokens that it gets, and R [H] what the
block is short of there, the ridge solution is

    dW = R (w h)^T ((w h)(w h)^T + lambda mean(diag) I)^-1,

sums over tokens, in float64 (``healing.normal``). Experts of a token add up, so that R is updated after every
one, and the sweep is repeated (Gauss-Seidel). lambda is chosen by the error on held-out tokens, "leave it as it is"
among the choices; that error is a function of the same sums over the held-out tokens.

Legend: N tokens, E experts, K experts per token, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from moesurgeon.engine.model import MoeBlock, shared_experts
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.healing.block import experts_name, missing_of, own_values
from moesurgeon.healing.data import BlockData
from moesurgeon.healing.exact import exact_device, factor
from moesurgeon.healing.normal import Chunks, leading_directions, ridge_solutions, sums_of
from moesurgeon.healing.room import Room

LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)
SWEEPS = 2
CHUNK = 4096
"""Tokens whose activations are held at once in float64, if they do not take more than ``CHUNK_BYTES``."""
CHUNK_BYTES = 256 << 20
ROW_BYTES = 28
"""For each of the H + F values of a token: gate, up and their product, and the chunk before it in float64."""

Activations = Callable[[BlockData, torch.Tensor], torch.Tensor]
"""Of these rows of the data what the map is fed [n, F]."""


@dataclass
class _Part:
    """One linear map of a block: its ``weight`` [H, F], the rows of each set that it sees and what it is fed there."""

    weight: torch.Tensor
    rows: tuple[torch.Tensor, torch.Tensor]
    activations: Activations


@torch.no_grad()
def refitted(
    block: MoeBlock,
    train: BlockData,
    heldout: BlockData,
    *,
    method: str = "ridge",
    sweeps: int = SWEEPS,
    rank: int | None = None,
    room: Room | None = None,
) -> dict[str, torch.Tensor]:
    """Return new values of the block's down projections, by their names in it, that leave less of the error.

    ``method``: "ridge", or "scale" for its one-parameter case a = <y_e, R + y_e> / <y_e, y_e>. ``rank``: change
    the maps in the span of so many leading directions of their activations only (``healing.normal``). A part that
    nothing improves on held-out tokens keeps its values.
    """
    room = room or Room()
    down: torch.Tensor = block.experts.down_proj.detach().clone()  # type: ignore[operator]
    sets, own = (train, heldout), own_values(block)
    missing = [
        missing_of(block, own, data, room.empty(f"{name}.missing", data.target.shape, torch.float32, down.device))
        for name, data in zip(("train", "heldout"), sets, strict=True)
    ]
    result = {f"{experts_name(block)}.down_proj": down}
    parts = [_of_expert(block, weight, expert, sets) for expert, weight in enumerate(down)]
    if (shared := shared_experts(block)) is not None:
        name, module = shared
        result[f"{name}.down_proj.weight"] = module.down_proj.weight.detach().clone()
        parts.append(_of_shared(block, module, result[f"{name}.down_proj.weight"], sets))
    for _sweep in range(sweeps if method == "ridge" else 1):
        for part in parts:
            if all(map(len, part.rows)):
                _improve(part, sets, missing, method=method, rank=rank)
    return result


def _improve(
    part: _Part, sets: tuple[BlockData, BlockData], missing: list[torch.Tensor], *, method: str, rank: int | None
) -> None:
    """Give the part the change that leaves least on held-out tokens, if any does, and update what is missing."""
    train, heldout = (partial(_chunks, part, *each) for each in zip(sets, part.rows, missing, strict=True))
    change = _scaled(part, train, heldout) if method == "scale" else _ridged(part, train, heldout, rank)
    if change is None:
        return
    for weight, more in zip(part.weight.split(512), change.split(512), strict=True):
        before = weight.to(more)
        weight.copy_(before + more)
        more.copy_(weight.to(more) - before)  # as rounded
    for data, rows, each in zip(sets, part.rows, missing, strict=True):
        for some in rows.split(chunk_tokens(part.weight.shape[0], part.weight.shape[1], data.at_once)):
            fed = factor(part.activations(data, some))
            each.index_add_(0, some.to(each.device), (fed @ change.T.to(fed)).to(each), alpha=-1.0)


def chunk_tokens(high: int, wide: int, at_once: int = BATCH_TOKENS) -> int:
    """Return how many tokens a map [H, F] is fed at once (``high``, ``wide``); fewer where batches are small.

    >>> chunk_tokens(2048, 1408), chunk_tokens(4096, 14336)
    (2774, 520)
    """
    most = CHUNK_BYTES * at_once // BATCH_TOKENS
    return max(64, min(CHUNK, at_once, most // (ROW_BYTES * (high + wide))))


def _chunks(
    part: _Part, data: BlockData, rows: torch.Tensor, missing: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what the part is fed [n, F] and what is missing [n, H], a chunk of its tokens at a time.

    Both times the root of each token's importance, so that squares and products count by it.
    """
    device = part.weight.device
    for some in rows.split(chunk_tokens(part.weight.shape[0], part.weight.shape[1], data.at_once)):
        root = data.importance[some, None].sqrt().to(device)
        fed = part.activations(data, some)
        yield fed * root.to(fed.dtype), missing[some.to(missing.device)].to(device) * root


def _ridged(part: _Part, train: Chunks, heldout: Chunks, rank: int | None) -> torch.Tensor | None:
    """Return the change [H, F] by the best lambda, None where all are worse than none."""
    low = rank is not None and rank < part.weight.shape[1]
    basis = leading_directions(train, part.weight, rank) if low and rank is not None else None
    learnt, judge = sums_of(train, part.weight, basis), sums_of(heldout, part.weight, basis)
    best, change = judge.square, None
    for candidate in ridge_solutions(learnt, LAMBDAS):
        error = judge.error(candidate)
        if error < best:
            best, change = error, candidate
    return change if change is None or basis is None else change @ basis.T


def _scaled(part: _Part, train: Chunks, heldout: Chunks) -> torch.Tensor | None:
    """Return (a - 1) W, a - 1 being least squares of R on the part's own output; None where that is worse."""
    weight = part.weight.to(exact_device(part.weight.device), torch.float64)
    (norm, along), (other_norm, other_along) = (_along(part.weight, each) for each in (train, heldout))
    if norm <= 0:
        return None
    more = along / norm
    return more * weight if more * more * other_norm < 2 * more * other_along else None


def _along(weight: torch.Tensor, chunks: Chunks) -> tuple[float, float]:
    """Return <y, y> and <y, R> of the part's output y."""
    norm = along = 0.0
    for fed, missing in chunks():
        output = factor(fed) @ factor(weight).T
        norm += float(output.square().sum())
        along += float((output * factor(missing)).sum())
    return norm, along


def _of_expert(block: MoeBlock, weight: torch.Tensor, expert: int, sets: tuple[BlockData, BlockData]) -> _Part:
    experts: Any = block.experts

    def activations(data: BlockData, rows: torch.Tensor) -> torch.Tensor:
        own = (data.weights[rows] * (data.indices[rows] == expert)).sum(-1, keepdim=True)
        inputs = data.inputs[rows.to(data.inputs.device)].to(weight.device)
        gate, up = F.linear(inputs, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        result: torch.Tensor = experts.act_fn(gate) * up * own.to(up.dtype)
        return result

    train, heldout = ((data.indices == expert).any(-1).nonzero().squeeze(-1) for data in sets)
    return _Part(weight, (train, heldout), activations)


def _of_shared(block: MoeBlock, shared: Any, weight: torch.Tensor, sets: tuple[BlockData, BlockData]) -> _Part:
    gate = getattr(block.module, "shared_expert_gate", None)  # Qwen2-MoE weighs its shared expert by a sigmoid

    def activations(data: BlockData, rows: torch.Tensor) -> torch.Tensor:
        inputs = data.inputs[rows.to(data.inputs.device)].to(weight.device)
        hidden: torch.Tensor = shared.act_fn(shared.gate_proj(inputs)) * shared.up_proj(inputs)
        return hidden if gate is None else hidden * gate(inputs).sigmoid()

    train, heldout = (torch.arange(len(data), device=data.indices.device) for data in sets)
    return _Part(weight, (train, heldout), activations)
