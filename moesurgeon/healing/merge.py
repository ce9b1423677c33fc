"""Folding the experts that a cut drops into those that stay, to begin healing from.

Each dropped expert goes to the survivor that is most like it on calibration tokens, by what both would bring and by
when their router wants them:

    s_ij = (cos(g_i f_i, g_j f_j) + corr(l_i, l_j)) / 2

with f the experts' outputs on all tokens of a sample, g their scores and l their logits, cosine and correlation over
the whole sample. A survivor and those that it is given are then averaged, unit by unit (``healing.align``), with the
tokens that the router gave each as weights:

    W = sum_j n_j P_j W_j / sum_j n_j        for gate, up and down projection.

After REAM (https://arxiv.org/abs/2604.04356), which compares mean outputs and weighs by REAP; nearest centre and
frequency weights are from MC-SMoE (https://arxiv.org/abs/2310.01334). The survivors' routers stay as they are.

Legend: n tokens of the sample, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import logits_in
from moesurgeon.engine.routing import Routing, routing_of
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Layer
from moesurgeon.errors import CheckpointError
from moesurgeon.healing.align import aligned, units_of
from moesurgeon.healing.block import Values, experts_name, own_values
from moesurgeon.healing.data import BlockData
from moesurgeon.surgery.plan import EditPlan

SAMPLE = 2048
"""Tokens on which all experts are run."""
OUTPUTS = 256 << 20
"""Bytes of outputs of all experts that are held at once, in float32."""


@dataclass(frozen=True)
class Merged:
    """``values``: of the survivors, by the names of the student's block. ``into``: dropped expert -> survivor.

    Both experts by the source's numbers, as in ``tokens``, which each was given on the text.
    """

    values: dict[str, torch.Tensor]
    into: dict[int, int]
    tokens: tuple[int, ...]


def survivors(plan: EditPlan | None, layer: int, experts: int) -> tuple[int, ...]:
    """Return the source's number of each expert that ``plan`` leaves in ``layer``, through all of its cuts."""
    numbers = tuple(range(experts))
    for operation in plan.record if plan else ():
        if operation["operation"] == "prune":
            renumbered = operation["expert_map"][str(layer)]
            numbers = tuple(numbers[int(old)] for old in sorted(renumbered, key=renumbered.__getitem__))
    return numbers


class Merger:
    """Merges the blocks of ``student``, whose source has all experts, layer by layer."""

    def __init__(self, student: Stream) -> None:
        self._student = student
        self._source = Stream(student.source)  # never walks: it lends its modules to each layer's weights

    def merged(self, layer: Layer, data: BlockData) -> Merged | None:
        """Return what folding gives, calibrated on ``data`` of the student's block; None where nothing was dropped.

        Raises CheckpointError if an expert gives no numbers on tokens of others.
        """
        anatomy = self._source.anatomy
        kept = survivors(self._student.overlay.plan, layer.number, anatomy.experts)
        if len(kept) == anatomy.experts:
            return None
        with self._source.bound(layer.number + 1, layer.read[self._student.source]):
            return merged(self._source.blocks[layer.number], data, kept, routing_of(anatomy))


@torch.no_grad()
def merged(block: MoeBlock, data: BlockData, kept: Sequence[int], routing: Routing) -> Merged:
    """Fold the experts of ``block`` that are not ``kept`` into those that are, on the inputs of ``data``."""
    experts: Any = block.experts
    device = experts.down_proj.device
    sample = torch.linspace(0, len(data) - 1, min(SAMPLE, len(data)), dtype=torch.float64).round().long()
    inputs = data.inputs[sample.to(data.inputs.device)].to(device)
    alike = similarity(block, inputs, routing).cpu().numpy()
    if not np.isfinite(alike).all():
        raise CheckpointError(
            f"layer {block.layer}: an expert that was run on tokens of others gives no number, or one too large; "
            "try --dtype float32, or leave --merge out"
        )
    into = nearest(alike, kept, routing.groups)
    tokens = counts(block, data)
    numbers = torch.tensor(kept, device=device)
    gate_up, down = experts.gate_up_proj[numbers], experts.down_proj[numbers]
    for place, survivor in enumerate(kept):
        members = [dropped for dropped, home in into.items() if home == survivor]
        total = sum(tokens[each] for each in (survivor, *members))
        if not members or not total:
            continue
        own = units_of(experts, survivor, inputs)
        sums = [own.gate_up.float() * (tokens[survivor] / total), own.down.float() * (tokens[survivor] / total)]
        for member in members:
            if not tokens[member]:
                continue
            theirs = units_of(experts, member, inputs)
            order, sign = aligned(own, theirs)
            gates, ups = theirs.gate_up.float().chunk(2)
            share = tokens[member] / total
            sums[0].add_(torch.cat([gates[order], ups[order] * sign[:, None]]), alpha=share)
            sums[1].add_(theirs.down.float()[:, order] * sign, alpha=share)
        gate_up[place], down[place] = sums[0].to(gate_up.dtype), sums[1].to(down.dtype)
    name = experts_name(block)
    return Merged({f"{name}.gate_up_proj": gate_up, f"{name}.down_proj": down}, into, tuple(tokens))


def nearest(similarity_EE: NDArray[Any], kept: Sequence[int], groups: int = 1) -> dict[int, int]:
    """Return for each expert that is not ``kept`` the most similar one that is, of its routing group if there are any.

    >>> nearest(np.array([[1, 0.2, 0.9, 0.1], [0.2, 1, 0, 0.3], [0.9, 0, 1, 0], [0.1, 0.3, 0, 1]]), [0, 3])
    {1: 3, 2: 0}
    """
    size = len(similarity_EE) // groups
    chosen = {}
    for dropped in sorted(set(range(len(similarity_EE))) - set(kept)):
        near = [survivor for survivor in sorted(kept) if survivor // size == dropped // size]
        chosen[dropped] = near[int(similarity_EE[dropped, near].argmax())]
    return chosen


def similarity(block: MoeBlock, inputs_nH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return how alike the experts of ``block`` are on ``inputs_nH`` [E, E], -1 to 1, in float64."""
    experts: Any = block.experts
    logits_nE, _indices = routed(block, inputs_nH)
    scores_nE = routing.scores(logits_nE).double()
    count, hidden = len(experts.down_proj), inputs_nH.shape[1]
    gram = torch.zeros(count, count, dtype=torch.float64, device=inputs_nH.device)
    rows = max(1, OUTPUTS // (count * hidden * 4))
    for some, gates in zip(inputs_nH.split(rows), scores_nE.split(rows), strict=True):
        outputs = torch.empty(count, len(some) * hidden, device=some.device)
        for expert in range(count):
            gate, up = F.linear(some, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            brought = F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
            outputs[expert] = (brought.float() * gates[:, expert, None].float()).flatten()
        gram += outputs @ outputs.T
    norm = gram.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    centred = logits_nE.double() - logits_nE.double().mean(0)
    centred = F.normalize(centred, dim=0)
    return (gram / norm[:, None] / norm + centred.T @ centred) / 2


def counts(block: MoeBlock, data: BlockData) -> list[int]:
    """Return how many tokens of ``data`` the router of ``block`` gives each expert."""
    experts: Any = block.experts
    found = torch.zeros(len(experts.down_proj), dtype=torch.int64)
    for _rows, inputs, _target in data.chunks(experts.down_proj.device):
        _logits, indices = routed(block, inputs)
        found += torch.bincount(indices.flatten().cpu(), minlength=len(found))
    numbers: list[int] = found.tolist()
    return numbers


def routed(block: MoeBlock, inputs_nH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the router's logits [n, E] and the experts [n, K] that ``block`` gives tokens to; no expert is run."""
    seen: dict[str, torch.Tensor] = {}

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        seen["logits"] = logits_in(output)

    def without_experts(inputs: torch.Tensor, indices_TK: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        seen["indices"] = indices_TK
        return torch.zeros_like(inputs)

    handle = block.router.register_forward_hook(keep)
    block.experts.forward = without_experts
    try:
        block.module(inputs_nH[None])
    finally:
        del block.experts.forward
        handle.remove()
    return seen["logits"].flatten(0, -2), seen["indices"]


@contextmanager
def put(student: Stream, block: MoeBlock, values: Values) -> Iterator[None]:
    """Inside the context ``block`` of ``student`` computes with ``values`` (by its own names) in place of its own."""
    own = own_values(block)
    try:
        for name, tensor in values.items():
            student.skeleton.put(f"{block.name}.{name}", tensor)
        yield
    finally:
        for name in values:
            student.skeleton.put(f"{block.name}.{name}", own[name])
