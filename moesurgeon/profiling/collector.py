"""From what a block did with a batch to sums: the inner loop of a profile.

Every batch gives one row per layer: sums by window, bucket of positions and expert. Rows are added up in the order of
the batches, whichever process they are from, so that the result does not depend on the number of processes.

Legend: N tokens of text, T of the batch, W windows, P buckets of positions, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation, replays
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from moesurgeon.errors import CheckpointError, OutputError
from moesurgeon.profiling.dispatch import add_dispatches
from moesurgeon.profiling.documents import Documents
from moesurgeon.profiling.statistics import (
    BINS,
    CLUSTERED,
    PEAK,
    PER_EXPERT,
    PER_LAYER,
    POSITIONS,
    Array,
    Statistics,
)
from moesurgeon.surgery.anatomy import Anatomy

_NAMES = (*PER_EXPERT, PEAK)


@dataclass(frozen=True)
class Cells:
    """Of a batch: ``rows`` [N], where its text is; ``cells`` [N], window x P + bucket of each; ``tokens`` [W, P]."""

    rows: torch.Tensor
    cells: torch.Tensor
    tokens: Array

    @classmethod
    def of(cls, batch: Batch) -> Cells:
        windows, length = batch.tokens.shape
        edges = torch.tensor(POSITIONS[1:], device=batch.tokens.device)
        buckets = torch.bucketize(torch.arange(length, device=batch.tokens.device), edges, right=True)
        everything = torch.arange(windows, device=batch.tokens.device)[:, None] * len(POSITIONS) + buckets
        rows = batch.is_text.flatten().nonzero().squeeze(-1)
        cells = everything.flatten()[rows]
        tokens = torch.bincount(cells, minlength=windows * len(POSITIONS)).double()
        return cls(rows, cells, tokens.view(windows, -1).cpu().numpy())


class Collector:
    """Turns observations into rows, and adds rows up in ``statistics``; ``batches`` are those of all processes."""

    def __init__(self, anatomy: Anatomy, domains: tuple[str, ...], batches: Sequence[Batch]) -> None:
        self.statistics = Statistics.empty(domains, anatomy.moe_layers, anatomy.experts, anatomy.top_k)
        self._title = anatomy.family.title
        self._routing = routing_of(anatomy)
        self._checked: set[int] = set()
        self._batches = batches
        self._windows = max(len(batch.windows) for batch in batches)
        self._documents = Documents(domains, batches, anatomy.experts)
        self._cells: Cells | None = None
        self._taken: Array = np.zeros(0)
        self._count_text()

    @property
    def width(self) -> int:
        """The length of a row."""
        experts, cells = self.statistics.experts, self._windows * len(POSITIONS)
        per_cell = len(_NAMES) * experts + len(PER_LAYER)
        return cells * per_cell + 2 * BINS + self.statistics.top_k * experts + experts * experts

    def visitor(self, batch: Batch) -> Collector:
        """Return who looks at ``batch`` on its way through a layer."""
        self._cells = Cells.of(batch)
        return self

    def taken(self) -> Array:
        """Return the row of what was seen last."""
        return self._taken

    def add(self, layer: int, number: int, row: Array) -> None:
        """Add the ``row`` of batch ``number`` to the sums of ``layer``."""
        statistics, batch = self.statistics, self._batches[number]
        experts, windows = statistics.experts, len(batch.windows)
        domain, place = statistics.domains.index(batch.domain), statistics.layers.index(layer)
        per_expert, row = _split(row, (self._windows, len(POSITIONS), len(_NAMES), experts))
        per_layer, row = _split(row, (self._windows, len(POSITIONS), len(PER_LAYER)))
        bins, row = _split(row, (2, BINS))
        ranks, row = _split(row, (statistics.top_k, experts))
        together, row = _split(row, (experts, experts))
        per_expert = per_expert[:windows]
        for column, name in enumerate(_NAMES):
            target = statistics.sums[name][domain, :, place]
            if name == PEAK:
                np.maximum(target, per_expert[:, :, column].max(axis=0), out=target)
            else:
                target += per_expert[:, :, column].sum(axis=0)
        for column, name in enumerate(PER_LAYER):
            statistics.sums[name][domain, :, place] += per_layer[:windows, :, column].sum(axis=0)
        for name, counts in zip(("entropy_bins", "margin_bins"), bins, strict=True):
            statistics.sums[name][domain, place] += counts
        statistics.sums["ranks"][domain, place] += ranks
        statistics.sums["together"][place] += together
        by_window = per_expert.sum(axis=1)
        self._documents.add(number, by_window[:, [_NAMES.index(name) for name in CLUSTERED]])
        tokens = [len(window.tokens) for window in batch.windows]
        loads = by_window[:, _NAMES.index("tokens")], by_window[:, _NAMES.index("first_choice")]
        add_dispatches(statistics, place, tokens, loads)

    def finish(self, layer: int) -> None:
        """Add what is known once all batches of ``layer`` are in; CheckpointError if a sum is no number."""
        place = self.statistics.layers.index(layer)
        self._documents.finish(self.statistics, place)
        for name in (*_NAMES, *PER_LAYER):
            if not np.isfinite(self.statistics.sums[name][:, :, place]).all():
                raise CheckpointError(
                    f"layer {layer}: expert outputs or router logits are not numbers: the weights hold NaN or "
                    "infinities, or overflow in this --dtype; try float32"
                )

    def __call__(self, block: MoeBlock, seen: Observation) -> None:
        """Take one block's observation down."""
        if block.layer not in self._checked:
            self._check(block, seen)
            self._checked.add(block.layer)
        assert self._cells is not None
        device, experts = seen.logits.device, self.statistics.experts
        rows, cells = self._cells.rows.to(device), self._cells.cells.to(device)
        count = self._windows * len(POSITIONS)
        logits, indices = seen.logits[rows], seen.indices[rows]
        weights, norms = seen.weights[rows].double(), seen.norms[rows].double()
        scores = self._routing.scores(logits)
        first = self._routing.choose(scores, selection_bias(block), 1).squeeze(-1)
        pull = weights * norms
        places = (cells[:, None] * experts + indices).flatten()

        def summed(where: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device).index_add_(0, where, values.flatten())

        columns = [
            summed(places, values, count * experts)
            for values in (torch.ones_like(weights), weights, norms, norms.square(), pull, pull.square())
        ]
        columns.append(summed(cells * experts + first, torch.ones_like(pull[:, 0]), count * experts))
        columns.append(torch.zeros_like(columns[0]).scatter_reduce_(0, places, pull.flatten(), "amax"))
        per_expert = torch.stack(columns).view(len(_NAMES), count, experts).transpose(0, 1)
        shares = (scores / scores.sum(-1, keepdim=True)).double()
        entropy = torch.special.entr(shares).sum(-1)
        best = scores.topk(min(2, experts), dim=-1).values.double()
        margin = best[:, 0] - best[:, -1]
        per_layer = torch.stack([summed(cells, values, count) for values in (entropy, margin)], dim=-1)
        bins = [_binned(values) for values in (entropy / math.log(max(2, experts)), margin)]
        # The gate's own order: rank 0 is the largest weight.
        order = weights.argsort(dim=-1, descending=True, stable=True)
        ranked = indices.gather(-1, order) + torch.arange(indices.shape[-1], device=device) * experts
        ranks = torch.bincount(ranked.flatten(), minlength=indices.shape[-1] * experts).double()
        pairs = (indices[:, :, None] * experts + indices[:, None, :]).flatten()
        together = torch.bincount(pairs, minlength=experts * experts).double()
        parts = [per_expert.flatten(), per_layer.flatten(), *bins, ranks, together]
        self._taken = torch.cat(parts).cpu().numpy()

    def _count_text(self) -> None:
        sums = self.statistics.sums
        for batch in self._batches:
            sums["seen"][self.statistics.domains.index(batch.domain)] += Cells.of(batch).tokens.sum(axis=0)
        self._documents.count(self.statistics)

    def _check(self, block: MoeBlock, seen: Observation) -> None:
        if not seen.output.isfinite().all():
            raise CheckpointError(
                f"layer {block.layer}: the experts' output is not finite: the weights hold NaN or infinities, "
                "or overflow in this --dtype; try float32"
            )
        if not replays(block, seen):
            raise OutputError(
                f"layer {block.layer}: replaying the recorded routing does not reproduce the block's output; "
                f"moesurgeon's picture of {self._title}'s experts is wrong here, please report it"
            )
        if not follows_rule(self._routing, block, seen):
            raise OutputError(
                f"layer {block.layer}: the weights are not what the {self._title} rule makes of the router's logits "
                f"({self._routing}); please report it"
            )


def follows_rule(routing: Routing, block: MoeBlock, seen: Observation) -> bool:
    """Tell whether the recorded choice and weights are what the family's rule gives, to rounding.

    The choice is compared by what the chosen experts rank at, so that a tie may fall either way: a
    softmax in bfloat16 (DeepSeek v1) makes ties of what differs in float32. Only relative
    differences count: raw weights of 64 experts are smaller than any absolute tolerance.
    """
    scores = routing.scores(seen.logits)
    ranked = routing.ranked(scores, selection_bias(block))
    best = ranked.topk(seen.indices.shape[-1], dim=-1).values
    chosen = ranked.gather(-1, seen.indices).sort(-1, descending=True).values
    weights = routing.weights(scores, seen.indices)
    tolerance = 1e-4 if seen.logits.dtype == torch.float32 else 2e-2
    return all(
        torch.allclose(recorded.float(), expected, rtol=tolerance, atol=1e-6)
        for recorded, expected in ((chosen, best), (seen.weights, weights))
    )


def _binned(values: torch.Tensor) -> torch.Tensor:
    """Count values from 0 to 1 by bin."""
    return torch.bincount((values * BINS).long().clamp(0, BINS - 1), minlength=BINS).double()


def _split(row: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Take an array of ``shape`` off the front of ``row``."""
    size = math.prod(shape)
    return row[:size].reshape(shape), row[size:]
