"""Whom the routers choose while a model is judged, layer by layer: what a collapse would show in first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesurgeon.engine.batches import Batch
from moesurgeon.profiling.statistics import normalised_entropy
from moesurgeon.recovery.capacity import places_of
from moesurgeon.surgery.anatomy import Anatomy

FACTORS = (1.0, 1.25, 2.0)
"""Capacity factors whose overflow is reported."""
Counts = NDArray[np.int64]
"""By batch, mixture layer and expert, how many tokens of text chose it [B, L, E]."""


class Monitor:
    """Counts the choices of text in one walk of ``batches``; its :meth:`watch` is told of every router's pass.

    ``windows``: by window, in the order of the batches, what :attr:`counts` has by batch [W, L, E].
    """

    def __init__(self, anatomy: Anatomy, batches: Sequence[Batch]) -> None:
        self._masks = [batch.is_text for batch in batches]
        self._starts = np.cumsum([0, *(len(mask) for mask in self._masks)])
        self._rows = {layer: row for row, layer in enumerate(anatomy.moe_layers)}
        self._next = dict.fromkeys(anatomy.moe_layers, 0)  # a walk takes the batches through a layer in order
        self.windows: Counts = np.zeros((self._starts[-1], len(self._rows), anatomy.experts), dtype=np.int64)

    @property
    def counts(self) -> Counts:
        return np.add.reduceat(self.windows, self._starts[:-1], axis=0)

    def watch(self, layer: int, chosen_TK: torch.Tensor) -> None:
        number = self._next[layer]
        mask = self._masks[number]
        assert mask.numel() == len(chosen_TK), "the walk left the order of its batches"
        self._next[layer] = number + 1
        experts = self.windows.shape[-1]
        window_T = torch.arange(len(mask), device=mask.device).repeat_interleave(mask.shape[1])
        places = (window_T[:, None] * experts + chosen_TK)[mask.flatten()]
        counts = places.flatten().bincount(minlength=len(mask) * experts).view(len(mask), experts)
        self.windows[self._starts[number] : self._starts[number + 1], self._rows[layer]] = counts.cpu().numpy()


def usage_of(anatomy: Anatomy, counts: Counts) -> dict[str, dict[str, Any]]:
    """Return figures by layer: ``entropy`` of use (1: even), ``max_over_mean``, the experts that are ``dead``.

    ``least``: the share of the least used, as part of an even one. ``overflow``: by capacity factor, the share of the
    choices that would find no place, in batches as they were judged.
    """
    found = {}
    for row, layer in enumerate(anatomy.moe_layers):
        loads = counts[:, row]
        total = loads.sum(axis=0)
        share = total / max(1, total.sum())
        found[str(layer)] = {
            "entropy": float(normalised_entropy(share)),
            "max_over_mean": float(share.max() * len(share)),
            "least": float(share.min() * len(share)),
            "dead": [int(expert) for expert in np.flatnonzero(total == 0)],
            "overflow": {f"{factor:g}": _overflow(loads, factor) for factor in FACTORS},
        }
    return found


def changed_experts(
    anatomy: Anatomy, mine: Counts, teachers: Counts, experts: dict[int, Sequence[int]], least: float
) -> dict[int, frozenset[int]]:
    """Return by layer the experts whose traffic differs from the teacher's by more than ``least`` of it.

    Traffic is the share of the choices, of the teacher's among the ``experts`` (its numbers, in the student's order)
    that the student has.
    """
    found = {}
    for row, layer in enumerate(anatomy.moe_layers):
        now = mine[:, row].sum(axis=0)
        then = teachers[:, row].sum(axis=0)
        before = then[list(experts[layer])] / max(1, then.sum())
        after = now / max(1, now.sum())
        found[layer] = frozenset(int(each) for each in np.flatnonzero(np.abs(after - before) > least * before))
    return found


def _overflow(loads: Counts, factor: float) -> float:
    dropped = sum(
        int(np.maximum(load - places_of(int(load.sum()), len(load), factor), 0).sum()) for load in loads if load.any()
    )
    return dropped / max(1, int(loads.sum()))
