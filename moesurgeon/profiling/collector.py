"""From what a block did with a batch to sums: the inner loop of a profile.

Every batch gives one row per layer: sums by window, bucket of positions and expert. Rows are added up in the order of
the batches, whichever process they are from, so that the result does not depend on the number of processes.

Legend: N tokens of text, T of the batch, W windows, P buckets of positions, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.finite import NotFinite
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
_AT_ONCE = 1 << 17  # scores: half a megabyte
_REPLAYED = 256  # tokens


@dataclass(frozen=True)
class Cells:
    """Of a batch: ``rows`` [N], where its text is; ``cells`` [N], window x P + bucket of each."""

    rows: torch.Tensor
    cells: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, buckets: int) -> Cells:
        windows, length = batch.tokens.shape
        edges = torch.tensor(POSITIONS[1:], device=batch.tokens.device)
        bucket = torch.bucketize(torch.arange(length, device=batch.tokens.device), edges, right=True)
        everything = torch.arange(windows, device=batch.tokens.device)[:, None] * buckets + bucket
        rows = batch.is_text.flatten().nonzero().squeeze(-1)
        return cls(rows, everything.flatten()[rows])


class Collector:
    """Turns observations into rows, and adds rows up in ``statistics``; ``batches`` are those of all processes."""

    def __init__(self, anatomy: Anatomy, domains: tuple[str, ...], batches: Sequence[Batch]) -> None:
        self.statistics = Statistics.empty(domains, anatomy.moe_layers, anatomy.experts, anatomy.top_k)
        self._title = anatomy.family.title
        self._routing = routing_of(anatomy)
        self._checked: set[int] = set()
        self._batches = batches
        self._windows = max(len(batch.windows) for batch in batches)
        longest = max(batch.tokens.shape[1] for batch in batches)
        self._buckets = sum(start < longest for start in POSITIONS)  # that there are positions for
        self._documents = Documents(domains, batches, anatomy.experts)
        self._known: dict[int, Cells] = {}  # the same in every layer
        self._cells: Cells | None = None
        self._taken: Array = np.zeros(0)
        self._count_text()

    @property
    def width(self) -> int:
        """The length of a row."""
        experts, cells = self.statistics.experts, self._windows * self._buckets
        per_cell = len(_NAMES) * experts + len(PER_LAYER)
        return cells * per_cell + 2 * BINS + self.statistics.top_k * experts + experts * experts

    def visitor(self, batch: Batch) -> Collector:
        """Return who looks at ``batch`` on its way through a layer."""
        cells = self._known.get(id(batch))
        self._cells = self._known[id(batch)] = Cells.of(batch, self._buckets) if cells is None else cells
        return self

    def taken(self) -> Array:
        """Return the row of what was seen last."""
        return self._taken

    def add(self, layer: int, number: int, row: Array) -> None:
        """Add the ``row`` of batch ``number`` to the sums of ``layer``."""
        statistics, batch = self.statistics, self._batches[number]
        experts, windows = statistics.experts, len(batch.windows)
        domain, place = statistics.domains.index(batch.domain), statistics.layers.index(layer)
        per_expert, row = _split(row, (self._windows, self._buckets, len(_NAMES), experts))
        per_layer, row = _split(row, (self._windows, self._buckets, len(PER_LAYER)))
        bins, row = _split(row, (2, BINS))
        ranks, row = _split(row, (statistics.top_k, experts))
        together, row = _split(row, (experts, experts))
        per_expert = per_expert[:windows]
        for column, name in enumerate(_NAMES):
            target = statistics.sums[name][domain, : self._buckets, place]
            if name == PEAK:
                np.maximum(target, per_expert[:, :, column].max(axis=0), out=target)
            else:
                target += per_expert[:, :, column].sum(axis=0)
        for column, name in enumerate(PER_LAYER):
            statistics.sums[name][domain, : self._buckets, place] += per_layer[:windows, :, column].sum(axis=0)
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
        rows, cells = self._cells.rows, self._cells.cells.to(device)
        count = self._windows * self._buckets
        logits, indices, weights, norms = seen.logits, seen.indices, seen.weights, seen.norms
        if len(rows) < len(logits):  # there is padding
            logits, indices, weights, norms = (each[rows.to(device)] for each in (logits, indices, weights, norms))
        weights, norms = weights.double(), norms.double()
        first, entropy, margin = router_figures(self._routing, logits, selection_bias(block))
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
        per_layer = torch.stack([summed(cells, values, count) for values in (entropy, margin)], dim=-1)
        bins = [_binned(values) for values in (entropy / math.log(max(2, experts)), margin)]
        # The gate's own order: rank 0 is the largest weight. Most gates have sorted them.
        if (weights[:, 1:] > weights[:, :-1]).any():
            indices = indices.gather(-1, weights.argsort(dim=-1, descending=True, stable=True))
        ranks = torch.stack([torch.bincount(each, minlength=experts) for each in indices.unbind(-1)]).double()
        together = _together(indices, experts)
        parts = [per_expert.flatten(), per_layer.flatten(), *bins, ranks.flatten(), together.flatten()]
        self._taken = torch.cat(parts).cpu().numpy()

    def _count_text(self) -> None:
        sums = self.statistics.sums
        for batch in self._batches:
            lengths = np.array([len(window.tokens) for window in batch.windows])
            edges = np.clip(np.array((*POSITIONS, np.inf)), None, lengths[:, None])
            sums["seen"][self.statistics.domains.index(batch.domain)] += np.diff(edges, axis=1).sum(axis=0)
        self._documents.count(self.statistics)

    def _check(self, block: MoeBlock, seen: Observation) -> None:
        if not seen.output.isfinite().all():
            raise NotFinite(f"layer {block.layer}: the experts' output is not finite in this --dtype; try float32")
        if not replays(block, some_of(seen)):
            raise OutputError(
                f"layer {block.layer}: replaying the recorded routing does not reproduce the block's output; "
                f"moesurgeon's picture of {self._title}'s experts is wrong here, please report it"
            )
        if not follows_rule(self._routing, block, seen):
            raise OutputError(
                f"layer {block.layer}: the weights are not what the {self._title} rule makes of the router's logits "
                f"({self._routing}); please report it"
            )


def router_figures(
    routing: Routing, logits_NE: torch.Tensor, bias_E: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return for each token the expert that a top-1 gate would take [N], the entropy of its shares [N], its margin [N].

    Shares are scores divided by their sum S, so H = log S - sum_i s_i log s_i / S. The margin is that between the
    two highest scores. A few tokens at a time: memory that is new with every batch costs more than the arithmetic.
    """
    experts = logits_NE.shape[-1]
    plain = bias_E is None and routing.groups == 1
    firsts, figures = [], []
    for logits in logits_NE.split(max(1, _AT_ONCE // experts)):
        scores = routing.scores(logits, as_stock=False)
        best, at = scores.max(-1, keepdim=True)
        firsts.append(at.squeeze(-1) if plain else routing.choose(scores, bias_E, 1).squeeze(-1))
        total = scores.sum(-1)
        entropy = total.log() - torch.special.xlogy(scores, scores).sum(-1) / total
        second = scores.scatter(-1, at, -torch.inf).max(-1).values if experts > 1 else best.squeeze(-1)
        figures.append(torch.stack([entropy.clamp(min=0.0), best.squeeze(-1) - second]))
    entropy, margin = torch.cat(figures, dim=-1).double()
    return torch.cat(firsts), entropy, margin


def some_of(seen: Observation) -> Observation:
    """Return the first token of every expert that has any, and every so many-th of all: enough to tell a mistake."""
    flat = seen.indices.flatten()
    first = torch.full((int(flat.max()) + 1,), len(flat), device=flat.device)
    first.scatter_reduce_(0, flat, torch.arange(len(flat), device=flat.device), "amin")
    rows = (first[first < len(flat)] // seen.indices.shape[-1]).unique()
    every = torch.arange(0, len(seen.inputs), max(1, len(seen.inputs) // _REPLAYED), device=flat.device)
    rows = torch.cat([rows, every])
    return replace(
        seen,
        **{name: getattr(seen, name)[rows] for name in ("logits", "indices", "weights", "norms", "inputs", "output")},
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


def _together(indices_NK: torch.Tensor, experts: int) -> torch.Tensor:
    """Count the tokens that were given to both [E, E]; on the diagonal those that were given to one."""
    columns = indices_NK.unbind(-1)
    counted = torch.bincount(indices_NK.flatten(), minlength=experts).diag()
    for place, one in enumerate(columns):
        for other in columns[place + 1 :]:
            pairs = torch.bincount(one * experts + other, minlength=experts * experts).view(experts, experts)
            counted = counted + pairs + pairs.t()
    return counted.double()


def _binned(values: torch.Tensor) -> torch.Tensor:
    """Count values from 0 to 1 by bin."""
    return torch.bincount((values * BINS).long().clamp(0, BINS - 1), minlength=BINS).double()


def _split(row: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Take an array of ``shape`` off the front of ``row``."""
    size = math.prod(shape)
    return row[:size].reshape(shape), row[size:]
