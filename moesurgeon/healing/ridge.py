"""Closed-form refits of down projections: the one part of an expert in which its output is linear.

For expert e with hidden activations h [F] and gate weight w on the tokens that it gets, and R [H] what the
block is short of there, the ridge solution is

    dW = R (w h)^T ((w h)(w h)^T + lambda mean(diag) I)^-1,

sums over tokens, in float64. Experts of a token add up, so that R is updated after every one, and the sweep is
repeated (Gauss-Seidel). lambda is chosen by the error on held-out tokens, "leave it as it is" among the choices;
that error is a function of the same sums over the held-out tokens.

Legend: N tokens, E experts, K experts per token, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moesurgeon.engine.model import MoeBlock
from moesurgeon.healing.block import experts_name, missing_of, own_values, shared_experts
from moesurgeon.healing.data import BlockData
from moesurgeon.healing.room import Room

LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)
SWEEPS = 2
CHUNK = 4096
"""Tokens whose activations are held at once in float64."""

Activations = Callable[[BlockData, torch.Tensor], torch.Tensor]
"""Of these rows of the data what the map is fed [n, F]."""


@dataclass
class _Part:
    """One linear map of a block: its ``weight`` [H, F], the rows of each set that it sees and what it is fed there."""

    weight: torch.Tensor
    rows: tuple[torch.Tensor, torch.Tensor]
    activations: Activations


@dataclass(frozen=True)
class _Sums:
    """Over the tokens of a part: h h^T [F, F], R h^T [H, F] and |R|^2."""

    gram: torch.Tensor
    moment: torch.Tensor
    square: torch.Tensor

    def error(self, change: torch.Tensor) -> torch.Tensor:
        """Return what is left of |R|^2 if the weight changes by ``change`` [H, F]."""
        return self.square - 2 * (change * self.moment).sum() + ((change @ self.gram) * change).sum()


@torch.no_grad()
def refitted(
    block: MoeBlock,
    train: BlockData,
    heldout: BlockData,
    *,
    method: str = "ridge",
    sweeps: int = SWEEPS,
    room: Room | None = None,
) -> dict[str, torch.Tensor]:
    """Return new values of the block's down projections, by their names in it, that leave less of the error.

    ``method``: "ridge", or "scale" for its one-parameter case a = <y_e, R + y_e> / <y_e, y_e>. A part that nothing
    improves on held-out tokens keeps its values.
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
                _improve(part, sets, missing, _by_ridge if method == "ridge" else _by_scale)
    return result


def _improve(
    part: _Part,
    sets: tuple[BlockData, BlockData],
    missing: list[torch.Tensor],
    propose: Callable[[_Sums, torch.Tensor], Iterator[torch.Tensor]],
) -> None:
    """Give the part the change that leaves least on held-out tokens, if any does, and update what is missing."""
    train, heldout = (_sums(part, *each) for each in zip(sets, part.rows, missing, strict=True))
    best, change = heldout.square, None
    for candidate in propose(train, part.weight):
        error = heldout.error(candidate)
        if error < best:
            best, change = error, candidate
    if change is None:
        return
    before = part.weight.double()
    part.weight.copy_((before + change).to(part.weight.dtype))
    change = part.weight.double() - before  # as rounded
    for data, rows, each in zip(sets, part.rows, missing, strict=True):
        for some in rows.split(CHUNK):
            brought = part.activations(data, some).double() @ change.T
            each.index_add_(0, some.to(each.device), brought.to(each), alpha=-1.0)


def _sums(part: _Part, data: BlockData, rows: torch.Tensor, missing: torch.Tensor) -> _Sums:
    high, wide = part.weight.shape
    sums = _Sums(*(part.weight.new_zeros(shape, dtype=torch.float64) for shape in ((wide, wide), (high, wide), ())))
    for some in rows.split(CHUNK):
        hidden = part.activations(data, some).double()
        short = missing[some.to(missing.device)].to(hidden)
        sums.gram.addmm_(hidden.T, hidden)
        sums.moment.addmm_(short.T, hidden)
        sums.square.add_(short.square().sum())
    return sums


def _by_ridge(sums: _Sums, _weight: torch.Tensor) -> Iterator[torch.Tensor]:
    strength = sums.gram.diagonal().mean()
    for factor in LAMBDAS if strength > 0 else ():
        regular = sums.gram.clone()
        regular.diagonal().add_(factor * strength)
        root, failed = torch.linalg.cholesky_ex(regular)
        if not failed:
            yield torch.cholesky_solve(sums.moment.T, root).T


def _by_scale(sums: _Sums, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """a - 1: least squares of R on the part's own output."""
    wide = weight.double()
    norm = ((wide @ sums.gram) * wide).sum()
    if norm > 0:
        yield (wide * sums.moment).sum() / norm * wide


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
