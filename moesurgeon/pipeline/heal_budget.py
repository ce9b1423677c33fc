"""How memory is shared out between a walk and what healing takes, and what to do where it is too little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.budget import Demand, share_out
from moesurgeon.engine.memory_use import MemoryUse
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.engine.working import COMPARED
from moesurgeon.errors import UsageError
from moesurgeon.healing.memory import HealingBytes, healing_bytes, trial_bytes, widest
from moesurgeon.healing.pace import Method, Pace
from moesurgeon.pipeline.options import HealSpec, Running

Batches = Callable[[int], Sequence[Batch]]
"""All that walk, by the tokens that one of them may have."""


def share_out_healing(
    sources: Sequence[Source],
    student: Stream,
    spec: HealSpec,
    running: Running,
    batches: Batches,
    trials: int = 0,
) -> MemoryUse:
    """Divide the memory as ``engine.budget`` does, both streams' states and all that healing takes included.

    ``trials``: tokens of a layer on which experts are chosen, before it is healed.
    """
    batches = cache(batches)
    plain = Stream(sources[0]) if trials else None

    def bytes_of(method: Method, pace: Pace, tokens: int = BATCH_TOKENS) -> HealingBytes:
        return healing_bytes(student, method, pace, batches(tokens), merge=spec.merge, at_once=tokens)

    def share(method: Method, pace: Pace) -> MemoryUse:
        @cache
        def demand(tokens: int) -> Demand:
            takes = bytes_of(method, pace, tokens)
            return Demand(
                batches=batches(tokens),
                streams=2 if len(sources) == 1 else 1,
                logits=COMPARED,
                copies=takes.copy,
                work=max(takes.work, trial_bytes(plain, trials, tokens) if plain else 0),
                held=takes.held,
            )

        return share_out(running.max_memory, sources, demand)

    try:
        return share(spec.method, spec.pace)
    except UsageError as error:
        if spec.method not in ("ridge", "distill"):
            raise
        said = [str(error)]
        takes, less = (bytes_of(each, spec.pace).work for each in (spec.method, "ridge"))
        if spec.method == "distill":
            said.append(f"distilling a layer takes {takes:,} bytes with its gradients and optimiser state")
            said.append(f"--heal-method ridge takes {less:,}")
        rank = _rank_that_fits(student, partial(share, "ridge"), spec.pace)
        if rank is not None:
            least = bytes_of("ridge", replace(spec.pace, rank=rank)).work
            method = "" if spec.method == "ridge" else "--heal-method ridge "
            said.append(f"{method}--heal-rank {rank} takes {least:,} rather than {less:,} and fits")
        raise UsageError("; ".join(said)) from error


def _rank_that_fits(student: Stream, fits: Callable[[Pace], object], pace: Pace) -> int | None:
    """Return the largest power of two as rank with which a refit fits; None where all of it does, or nothing does."""
    widths = [1 << power for power in range(23, 3, -1)]
    ranks: list[int | None] = [None, *(rank for rank in widths if rank < widest(student))]
    for rank in ranks:
        with suppress(UsageError):
            fits(replace(pace, rank=rank))
            return rank
    return None
