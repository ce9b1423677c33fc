"""What became of the tokens of experts that were dropped: where they go now, and what is wrong with them.

Whose token it was says the teacher's routing, which is taken down while the teacher moves through the layer. What is
kept of a token are its error and its experts, nothing with a hidden dimension.

Legend: N held-out tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Layer
from moesurgeon.healing.block import Values, output_of, own_values
from moesurgeon.healing.data import BlockData
from moesurgeon.surgery.numbering import source_experts

MOST = 4
"""Experts that are named for the tokens of one that went."""


def numbers_of(student: Stream, teacher: Stream, layer: int) -> tuple[int, ...] | None:
    """Return the student's experts of ``layer`` in the source's numbering; None where the teacher has another one."""
    plan, experts = student.overlay.plan, student.source.anatomy.experts
    if teacher.anatomy.experts != experts or plan is None:
        return None
    return source_experts(plan.record, layer, experts)


def move_watched(layer: Layer, teacher: Stream, batches: Sequence[int]) -> torch.Tensor | None:
    """Move ``batches`` of the teacher through the layer; return the experts [N, K] of their tokens, if it has any."""
    block, given = teacher.blocks.get(layer.number), []
    for number in batches:
        if block is None:
            layer.move(teacher, number)
            continue
        with _choices(block) as chosen:
            layer.move(teacher, number)
        text = layer.walk.batches[number].is_text.flatten().to(chosen[0].device)
        given.append(chosen[0][text])
    return torch.cat(given) if given else None


def became_of_dropped(
    student: Stream, teacher: Stream, layer: int, values: Values, data: BlockData, given_NK: torch.Tensor | None
) -> dict[str, Any]:
    """Return ``dropped`` for a layer's report (see :func:`explained`), healed to ``values`` by the student's names.

    Nothing where the teacher counts its experts otherwise than the student's source.
    """
    numbers = numbers_of(student, teacher, layer)
    if numbers is None or given_NK is None:
        return {}
    block, own = student.blocks[layer], own_values(student.blocks[layer])
    healed = own | {name.removeprefix(f"{block.name}."): tensor for name, tensor in values.items()}
    experts = student.source.anatomy.experts
    return {"dropped": explained(block, own, healed, data, given_NK, numbers, experts=experts)}


def explained(
    block: MoeBlock,
    before: Values,
    after: Values,
    data: BlockData,
    given_NK: torch.Tensor,
    numbers: Sequence[int],
    *,
    experts: int,
) -> list[dict[str, Any]]:
    """Return what there is to say of each of the source's ``experts`` that is not among ``numbers``.

    ``tokens`` of ``data`` that the teacher gave it (``given_NK``); ``error_before`` and ``error_after``: the squared
    error of the block with these values on those tokens, as a share of the target's square (None without tokens);
    ``now``: the experts that they are given most often, with the share of those tokens that each of them gets. All in
    the source's numbering.
    """
    dropped = [expert for expert in range(experts) if expert not in set(numbers)]
    if not dropped:
        return []
    wrong_before, norm, _ = _by_token(block, before, data)
    wrong_after, _norm, now_NK = _by_token(block, after, data)
    given_NK = given_NK.cpu()
    found = []
    for expert in dropped:
        mine = (given_NK == expert).any(-1)
        count, size = int(mine.sum()), float(norm[mine].sum())
        shares = torch.bincount(now_NK[mine].flatten(), minlength=len(numbers)) / max(1, count)
        best = shares.argsort(descending=True, stable=True)[:MOST].tolist()
        found.append(
            {
                "expert": expert,
                "tokens": count,
                "error_before": float(wrong_before[mine].sum()) / size if size else None,
                "error_after": float(wrong_after[mine].sum()) / size if size else None,
                "now": [{"expert": numbers[one], "share": float(shares[one])} for one in best if shares[one] > 0],
            }
        )
    return found


@torch.no_grad()
def _by_token(block: MoeBlock, values: Values, data: BlockData) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the squared error and the target's square [N] in float64, by importance, and the experts [N, K]."""
    wrong, norm, chosen = [], [], []
    for rows, inputs, target in data.chunks(block.experts.down_proj.device):  # type: ignore[arg-type]
        with _choices(block) as now:
            output = output_of(block, values, inputs)
        importance = data.importance[rows].cpu().double()
        wrong.append((output.float() - target.float()).square().sum(-1).cpu().double() * importance)
        norm.append(target.float().square().sum(-1).cpu().double() * importance)
        chosen.append(now[0].cpu())
    return torch.cat(wrong), torch.cat(norm), torch.cat(chosen)


@contextmanager
def _choices(block: MoeBlock) -> Iterator[list[torch.Tensor]]:
    """Inside the context the experts [T, K] of every call's tokens are put into what is yielded."""
    seen: list[torch.Tensor] = []

    def hook(_module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        indices = named["top_k_index"] if "top_k_index" in named else given[1]
        seen.append(indices.detach().clone())

    handle = block.experts.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
