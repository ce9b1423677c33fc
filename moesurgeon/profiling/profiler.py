"""One walk over the traces that fills the statistics of a profile.

On the first batch of every layer the recorded routing is held against the block twice: replayed
through the stock experts it must reproduce the block's output, and it must be what the family's rule
makes of the recorded logits. A profile that records anything else is worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation, replays
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from moesurgeon.engine.state import WalkState
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.errors import CheckpointError, OutputError
from moesurgeon.profiling.statistics import PEAK, PER_EXPERT, PER_LAYER, Array, Statistics
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.anatomy import Anatomy

_NAMES = (*PER_EXPERT, PEAK)


def take_profile(
    stream: Stream,
    domains: tuple[str, ...],
    batches: Sequence[Batch],
    *,
    ranks: Ranks | None = None,
    folder: Path | None = None,
    state: WalkState | None = None,
    progress: Progress = SILENT,
) -> Statistics:
    """Take ``batches`` through all layers of ``stream`` and return its routing statistics.

    Of several ``ranks`` each walks with its batches, and all return the statistics of all. ``folder``:
    where hidden states go if not into memory; with a ``state`` they go there, and the walk goes on from
    the last layer that an earlier one finished. Raises OutputError if the routing recorded is not the
    routing that the model used.
    """
    ranks = ranks or Ranks()
    mine = [batches[number] for number in ranks.mine(len(batches))]
    collector = _Collector(stream.anatomy, domains)
    sums = collector.statistics.sums
    for batch in batches:
        collector.statistics.seen[domains.index(batch.domain)] += batch.text_tokens
    walk = Walk([stream], mine, folder if state is None else state.folder, keep=state is not None)
    start = state.resumed(walk, sums, ranks) if state else 0
    tokens = sum(batch.text_tokens for batch in mine)
    with progress.task("profiling", tokens, "tokens") as advance, closing(walk.layers(start)) as layers:
        advance(tokens * start / stream.source.layers)
        for layer in layers:
            taken = []
            for number, batch in enumerate(mine):
                layer.move(stream, number, collector.visitor(batch))
                taken.append(collector.taken())
                advance(batch.text_tokens / stream.source.layers)
            if layer.number in stream.anatomy.moe_layers:
                parts = ranks.gathered(np.array(taken).reshape(len(taken), collector.width), len(batches))
                collector.add(layer.number, [batch.domain for batch in batches], parts)
            if state:
                state.save(walk, layer.number + 1, sums, ranks)
    return collector.statistics


class _Collector:
    """Turns observations into one row of sums for each batch and layer, and adds rows up in their order."""

    def __init__(self, anatomy: Anatomy, domains: tuple[str, ...]) -> None:
        self.statistics = Statistics.empty(domains, anatomy.moe_layers, anatomy.experts, anatomy.top_k)
        self._title = anatomy.family.title
        self._routing = routing_of(anatomy)
        self._checked: set[int] = set()
        self._rows = torch.empty(0)
        self._taken: Array = np.zeros(0)

    def visitor(self, batch: Batch) -> _Collector:
        """Return who looks at ``batch`` on its way through a layer."""
        self._rows = batch.is_text.flatten().nonzero().squeeze(-1)
        self._taken = np.zeros(self.width)
        return self

    def taken(self) -> Array:
        """Return the row of the last batch: a value per expert of each name, then those per layer."""
        return self._taken

    def add(self, layer: int, domains: Sequence[str], rows: Array) -> None:
        """Add the ``rows`` of all batches to the sums of ``layer``."""
        experts = self.statistics.experts
        number = self.statistics.layers.index(layer)
        for domain, row in zip(domains, rows, strict=True):
            place = (self.statistics.domains.index(domain), number)
            for name, values in zip(_NAMES, row[: len(_NAMES) * experts].reshape(-1, experts), strict=True):
                total = self.statistics.sums[name][place]
                total[:] = np.maximum(total, values) if name == PEAK else total + values
            for name, value in zip(PER_LAYER, row[len(_NAMES) * experts :], strict=True):
                self.statistics.sums[name][place] += value
        if not all(np.isfinite(sums[:, number]).all() for sums in self.statistics.sums.values()):
            raise CheckpointError(
                f"layer {layer}: expert outputs or router logits are not numbers: the weights hold NaN or infinities, "
                "or overflow in this --dtype; try float32"
            )

    def __call__(self, block: MoeBlock, seen: Observation) -> None:
        """Take one block's observation down."""
        if block.layer not in self._checked:
            self._check(block, seen)
            self._checked.add(block.layer)
        rows = self._rows.to(seen.logits.device)
        logits, indices = seen.logits[rows], seen.indices[rows]
        weights, norms = seen.weights[rows].double(), seen.norms[rows].double()
        scores = self._routing.scores(logits)
        first = self._routing.choose(scores, selection_bias(block), 1).squeeze(-1)
        pull = weights * norms
        chosen = indices.flatten()
        columns = [
            self._per_expert(chosen, values.flatten())
            for values in (torch.ones_like(weights), weights, norms, norms.square(), pull, pull.square())
        ]
        columns.append(self._per_expert(first, torch.ones_like(weights[:, 0])))
        columns.append(torch.zeros_like(columns[0]).scatter_reduce_(0, chosen, pull.flatten(), "amax"))
        shares = scores / scores.sum(-1, keepdim=True)
        best = scores.topk(min(2, scores.shape[-1]), dim=-1).values.double()
        ends = torch.stack([torch.special.entr(shares.double()).sum(), (best[:, 0] - best[:, -1]).sum()])
        self._taken = torch.cat([*columns, ends]).cpu().numpy()

    @property
    def width(self) -> int:
        """The length of a row."""
        return len(_NAMES) * self.statistics.experts + len(PER_LAYER)

    def _per_expert(self, experts: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(self.statistics.experts, dtype=torch.float64, device=values.device)
        return sums.index_add_(0, experts, values)

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
