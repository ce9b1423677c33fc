"""Profiling what stages have left of a checkpoint: an overlay, on the text that heals."""

from __future__ import annotations

from pathlib import Path

import transformers

from moesurgeon.engine.ranks import Ranks
from moesurgeon.pipeline.heal import Healer
from moesurgeon.pipeline.profile_extras import extras
from moesurgeon.profiling.all_experts import InnerSpec
from moesurgeon.profiling.artefact import Origin, Profile, load_profile, save_profile
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.progress import Progress
from moesurgeon.surgery.plan import EditPlan

_INNER_TOKENS = 4096


def stage_profile(
    healer: Healer, plan: EditPlan, place: Path, fingerprint: str, criterion: str | None, progress: Progress
) -> Profile:
    """Return the profile of what ``plan`` makes of the checkpoint with this ``fingerprint``, kept in ``place``.

    One that is there already is taken. With the ``criterion`` reconstruction it has inner products.
    """
    if place.exists():
        return load_profile(place)
    stream, ranks = healer.student(plan), Ranks()
    inner = InnerSpec(tokens=_INNER_TOKENS) if criterion == "reconstruction" else None
    origin = Origin(
        fingerprint=fingerprint,
        family=stream.anatomy.family.name,
        splits=dict(healer.train.splits),
        trace_hashes=dict(healer.train.hashes),
        length=healer.length,
        placement=str(stream.source.placement),
        transformers=transformers.__version__,
        chat_template=healer.train.chat_template,
    )
    with extras(
        stream, healer.train.domains, healer.learn, inner, latency=False, ranks=ranks,
        folder=place.with_name(f".{place.name}.inner"), stays=False, progress=progress,
    ) as more:  # fmt: skip
        statistics = take_profile(
            stream, healer.train.domains, healer.learn, folder=healer.folder, extras=list(more), progress=progress
        )
        save_profile(Profile(statistics, origin, *more.found()), place)
    return load_profile(place)
