"""One walk over the traces that fills the statistics of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation, Visitor
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.state import WalkState
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.profiling.collector import Collector
from moesurgeon.profiling.extras import Extra
from moesurgeon.profiling.statistics import Statistics
from moesurgeon.progress import SILENT, Progress


def take_profile(
    stream: Stream,
    domains: tuple[str, ...],
    batches: Sequence[Batch],
    *,
    ranks: Ranks | None = None,
    folder: Path | None = None,
    state: WalkState | None = None,
    extras: Sequence[Extra] = (),
    progress: Progress = SILENT,
) -> Statistics:
    """Take ``batches`` through all layers of ``stream`` and return its routing statistics.

    Of several ``ranks`` each walks with its batches, and all return the statistics of all. ``folder``:
    where hidden states go if not into memory; with a ``state`` they go there, and the walk goes on from
    the last layer that an earlier one finished. ``extras`` look on, and keep what they find. Raises OutputError
    if the routing recorded is not the routing that the model used.
    """
    ranks = ranks or Ranks()
    mine = [batches[number] for number in ranks.mine(len(batches))]
    collector = Collector(stream.anatomy, domains, batches)
    sums = {**collector.statistics.sums, **{name: each for extra in extras for name, each in extra.arrays.items()}}
    walk = Walk([stream], mine, folder if state is None else state.folder, keep=state is not None)
    start = state.resumed(walk, sums, ranks) if state else 0
    tokens = sum(batch.text_tokens for batch in mine)
    with progress.task("profiling", tokens, "tokens") as advance, closing(walk.layers(start)) as layers:
        advance(tokens * start / stream.source.layers)
        for layer in layers:
            is_moe = layer.number in stream.anatomy.moe_layers
            # A round is one batch of every rank: what they gave is added up in order before the next.
            for first in range(0, len(batches), ranks.size):
                number = first // ranks.size
                row = np.zeros(collector.width if is_moe else 0)
                if number < len(mine):
                    look = _all_of(collector.visitor(mine[number]), first + ranks.number, extras) if is_moe else None
                    layer.move(stream, number, look)
                    row = collector.taken() if is_moe else row
                    advance(mine[number].text_tokens / stream.source.layers)
                if is_moe:
                    together = min(ranks.size, len(batches) - first)
                    given = row[None] if ranks.number < together else row[None][:0]
                    for place, each in enumerate(ranks.gathered(given, together)):
                        collector.add(layer.number, first + place, each)
                    for extra in extras:
                        extra.gather(layer.number, first, ranks)
            if is_moe:
                collector.finish(layer.number)
                for extra in extras:
                    extra.finish(layer.number)
            if state:
                state.save(walk, layer.number + 1, sums, ranks)
    return collector.statistics


def _all_of(collector: Visitor, number: int, extras: Sequence[Extra]) -> Visitor:
    """Return who looks at batch ``number``: the collector, then those of the extras that want to."""
    others = [visitor for extra in extras if (visitor := extra.visitor(number)) is not None]
    if not others:
        return collector

    def visit(block: MoeBlock, seen: Observation) -> None:
        for visitor in (collector, *others):
            visitor(block, seen)

    return visit
