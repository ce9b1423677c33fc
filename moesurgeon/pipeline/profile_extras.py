"""What ``profile`` takes besides its statistics where it is asked to: inner products and latency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.streams import Stream
from moesurgeon.profiling import inner
from moesurgeon.profiling.all_experts import AllExperts, InnerSpec, rule_of
from moesurgeon.profiling.extras import Extra
from moesurgeon.profiling.inner import Inner
from moesurgeon.profiling.latency import Latency
from moesurgeon.progress import Progress


@dataclass(frozen=True)
class Extras:
    """``experts`` for inner products, ``latency`` for times; None: not asked for."""

    experts: AllExperts | None
    latency: Latency | None
    path: Path
    stream: Stream
    ranks: Ranks

    def __iter__(self) -> Iterator[Extra]:
        yield from (extra for extra in (self.experts, self.latency) if extra is not None)

    def found(self) -> tuple[Inner | None, dict[str, Any] | None]:
        """Return what the first process has once the walk is over; the others have nothing."""
        if not self.ranks.is_first:
            return None, None
        placement, experts, latency = self.stream.source.placement, self.experts, self.latency
        products = None if experts is None else Inner.open(self.path, experts.shape, rule_of(self.stream.anatomy))
        return products, None if latency is None else latency.facts(placement.device, placement.dtype)


@contextmanager
def extras(
    stream: Stream,
    domains: tuple[str, ...],
    batches: Sequence[Batch],
    spec: InnerSpec | None,
    *,
    latency: bool,
    ranks: Ranks,
    folder: Path,
    stays: bool,
    progress: Progress,
) -> Iterator[Extras]:
    """Make what is asked for ready; what inner products take is said first, and refused if it does not fit.

    ``folder``: where they are gathered, on the file system that the profile goes to; they stay there if ``stays``.
    """
    path = folder / inner.NAME
    experts = None
    try:
        if spec is not None:
            experts = AllExperts(stream.anatomy, domains, batches, spec, path, stream.source.scratch.tokens)
            if ranks.is_first:
                progress.note(estimate(experts, stream, batches))
                experts.open()
        yield Extras(experts, Latency(stream.anatomy, batches, ranks) if latency else None, path, stream, ranks)
    finally:
        if experts is not None and ranks.is_first and not stays:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # holds what another attempt left
                folder.rmdir()


def estimate(experts: AllExperts, stream: Stream, batches: Sequence[Batch]) -> str:
    """Say in a line what the inner products take on the disk and in time.

    A product of [a, b] with [b, c] is 2abc operations. What a walk does by itself is counted without attention
    scores: two operations for each parameter that a token meets.
    """
    shape, anatomy = experts.shape, stream.anatomy
    expert = 3 * anatomy.hidden * anatomy.expert_width
    layers, rows = len(shape.layers), len(shape.layers) * shape.tokens
    ours = rows * 2 * (shape.kept * expert + anatomy.hidden * shape.kept * (shape.kept + 1))
    skeleton = stream.skeleton
    names = [name for layer in range(skeleton.layers) for name in skeleton.names_of_layer(layer)]
    met = sum(torch.Size(skeleton.targets[name].shape).numel() for name in names)
    met -= layers * (anatomy.experts - anatomy.top_k) * expert
    walk = 2 * met * sum(batch.text_tokens for batch in batches)
    return (
        f"inner products of {shape.tokens:,} tokens, {shape.kept} experts, {layers} layers: "
        f"{shape.nbytes / 1e6:,.1f} MB and {ours / 1e9:,.1f} GFLOP, about {ours / max(1, walk):.0%} of what "
        "the profile computes by itself"
    )
