"""Closed-form refits of down projections: the one part of an expert in which its output is linear.

For expert e with hidden activations h [F] and gate weight w on the tokens that it gets, and R [H] what the
block is short of there, the ridge solution is

    dW = R (w h)^T ((w h)(w h)^T + lambda mean(diag) I)^-1,

sums over tokens, in float64. Experts of a token add up, so that R is updated after every one, and the sweep is
repeated (Gauss-Seidel). lambda is chosen by the error on held-out tokens, "leave it as it is" among the choices.

Legend: N tokens, E experts, K experts per token, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moesurgeon.engine.model import MoeBlock
from moesurgeon.healing.data import BlockData

LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)
SWEEPS = 2

Activations = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class _Part:
    """One linear map of a block: its ``weight`` [H, F], the tokens it sees of each set and what it is fed there."""

    weight: torch.Tensor
    rows: tuple[torch.Tensor, torch.Tensor]
    activations: tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]


def refitted(
    block: MoeBlock, train: BlockData, heldout: BlockData, *, method: str = "ridge"
) -> Mapping[str, torch.Tensor]:
    """Return new values of the block's down projections, by their names in it, that leave less of the error.

    ``method``: "ridge", or "scale" for its one-parameter case a = <y_e, R + y_e> / <y_e, y_e>. Names are those of
    ``block.module``; a part that no lambda improves on held-out tokens keeps its values.
    """
    down: torch.Tensor = block.experts.down_proj.detach().clone()  # type: ignore[operator]
    missing = [(data.target - data.output).double() for data in (train, heldout)]
    parts = [_of_expert(block, down, expert, (train, heldout)) for expert in range(len(down))]
    result: dict[str, torch.Tensor] = {}
    shared = shared_down(block)
    if shared is not None:
        name, weight = shared[0], shared[1].detach().clone()
        parts.append(_of_shared(block, weight, (train, heldout)))
        result[name] = weight
    for _sweep in range(SWEEPS if method == "ridge" else 1):
        for part in parts:
            if len(part.rows[0]) and len(part.rows[1]):
                (_ridge if method == "ridge" else _scale)(part, missing)
    result[f"{_experts_name(block)}.down_proj"] = down
    return result


def shared_down(block: MoeBlock) -> tuple[str, torch.Tensor] | None:
    """Return name and weight of the shared experts' down projection, if there is one in the block."""
    for name, module in block.module.named_modules():
        if isinstance(module, nn.Linear) and "shared" in name and name.endswith(("down_proj", "w2")):
            return f"{name}.weight", module.weight
    return None


def _ridge(part: _Part, missing: list[torch.Tensor]) -> None:
    hidden, held = (activations() for activations in part.activations)
    short, short_held = (each[rows] for each, rows in zip(missing, part.rows, strict=True))
    gram = hidden.T @ hidden
    moment = short.T @ hidden
    diagonal = gram.diagonal().mean()
    if not diagonal > 0:
        return
    best, change = short_held.square().sum(), None
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for strength in LAMBDAS:
        factor = torch.linalg.cholesky(gram + strength * diagonal * eye)
        candidate = torch.cholesky_solve(moment.T, factor).T
        error = (short_held - held @ candidate.T).square().sum()
        if error < best:
            best, change = error, candidate
    if change is not None:
        _take(part, change, missing, (hidden, held))


def _scale(part: _Part, missing: list[torch.Tensor]) -> None:
    hidden, held = (activations() for activations in part.activations)
    weight = part.weight.double()
    output, output_held = hidden @ weight.T, held @ weight.T
    short, short_held = (each[rows] for each, rows in zip(missing, part.rows, strict=True))
    norm = output.square().sum()
    if not norm > 0:
        return
    change = (output * short).sum() / norm  # a - 1: least squares of short on output
    if (short_held - change * output_held).square().sum() < short_held.square().sum():
        _take(part, change * weight, missing, (hidden, held))


def _take(part: _Part, change: torch.Tensor, missing: list[torch.Tensor], hidden: tuple[torch.Tensor, ...]) -> None:
    """Add ``change`` to the weight, and take what it brings off what is missing."""
    before = part.weight.double()
    part.weight.copy_((before + change).to(part.weight.dtype))
    change = part.weight.double() - before  # as rounded
    for each, rows, activations in zip(missing, part.rows, hidden, strict=True):
        each.index_add_(0, rows, activations @ change.T, alpha=-1.0)


def _of_expert(block: MoeBlock, down: torch.Tensor, expert: int, sets: tuple[BlockData, BlockData]) -> _Part:
    rows, activations = [], []
    for data in sets:
        token, rank = torch.where(data.indices == expert)
        rows.append(token)
        activations.append(_expert_activations(block, expert, data, token, rank))
    return _Part(down[expert], (rows[0], rows[1]), (activations[0], activations[1]))


def _expert_activations(
    block: MoeBlock, expert: int, data: BlockData, token: torch.Tensor, rank: torch.Tensor
) -> Callable[[], torch.Tensor]:
    def made() -> torch.Tensor:
        experts: Any = block.experts
        gate, up = F.linear(data.inputs[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return (experts.act_fn(gate) * up).double() * data.weights[token, rank, None].double()

    return made


def _of_shared(block: MoeBlock, weight: torch.Tensor, sets: tuple[BlockData, BlockData]) -> _Part:
    made = tuple(_shared_activations(block, data) for data in sets)
    rows = tuple(torch.arange(len(data), device=data.inputs.device) for data in sets)
    return _Part(weight, (rows[0], rows[1]), (made[0], made[1]))


def _shared_activations(block: MoeBlock, data: BlockData) -> Callable[[], torch.Tensor]:
    def made() -> torch.Tensor:
        shared = next(
            module
            for name, module in block.module.named_children()
            if name.startswith("shared") and any(module.children())
        )
        parts: Any = shared
        hidden = parts.act_fn(parts.gate_proj(data.inputs)) * parts.up_proj(data.inputs)
        gate = getattr(block.module, "shared_expert_gate", None)  # Qwen2-MoE weighs its shared expert by a sigmoid
        factor = 1.0 if gate is None else gate(data.inputs).sigmoid().double()
        result: torch.Tensor = hidden.double() * factor
        return result

    return made


def _experts_name(block: MoeBlock) -> str:
    return next(name for name, module in block.module.named_modules() if module is block.experts)
