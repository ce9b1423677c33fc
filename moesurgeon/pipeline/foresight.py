"""What a profile says of fewer experts per token before anything is written: collapse, and the error of each layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgeon.checkpoint.places import refuse_within
from moesurgeon.checkpoint.whole_file import refuse_file, whole_file
from moesurgeon.errors import ProfileError, UsageError
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.profile_match import check_profile
from moesurgeon.pipeline.subject import Subject
from moesurgeon.progress import SILENT, Progress

if TYPE_CHECKING:  # numpy and torch, which a config edit needs not
    from moesurgeon.profiling.artefact import Profile


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """``profile`` of the checkpoint: says whether routing would collapse.

    ``per_layer``: also the error of each layer at every top-k, from inner products. ``average``: divide so many experts
    per token (1.5, say) among the layers, so that their errors add up to the least; ``out``: a JSON file for that.
    """

    profile: Path | None = None
    per_layer: bool = False
    average: float | None = None
    out: Path | None = None

    @property
    def wants_layers(self) -> bool:
        return self.per_layer or self.average is not None or self.out is not None


def refuse_unforeseeable(asked: Foresight, subject: Subject, writing: Writing) -> None:
    """Raise UsageError or OutputError, without reading a profile, for what cannot be told or could not be written."""
    if asked.wants_layers and asked.profile is None:
        raise UsageError(
            "the error of each layer follows from a profile with inner products: give --profile "
            "(moesurgeon profile --inner 4096 makes one)"
        )
    most = subject.anatomy.top_k
    if asked.average is not None and not 1 <= asked.average <= most:
        raise UsageError(f"--per-layer-average {asked.average:g} is not between 1 and the checkpoint's {most}")
    if asked.out is None:
        return
    if asked.average is None:
        raise UsageError(
            "--per-layer-out needs to know how many experts per token there may be: add --per-layer-average, as 1.5"
        )
    read = () if asked.profile is None else (asked.profile,)
    refuse_within(asked.out, "--per-layer-out", writing.output, subject.root, *read)
    if not writing.dry_run:
        refuse_file(asked.out, "--per-layer-out", overwrite=writing.overwrite)


def foresee(subject: Subject, top_k: int, asked: Foresight, progress: Progress = SILENT) -> dict[str, Any]:
    """Return what the profile of ``asked`` says of ``subject`` with a top-``top_k`` gate, ``warnings`` among it.

    ``collapse`` by layer (``profiling.collapse``; None where the profile does not say), and if asked for ``per_layer``,
    ``rather`` and ``divided``. Nothing but ``warnings`` without a profile. Raises ProfileError for a profile of another
    checkpoint, or without what is needed.
    """
    if asked.profile is None:
        return {"warnings": []}
    from moesurgeon.profiling.artefact import load_profile

    profile = load_profile(asked.profile)
    check_profile(profile, subject, asked.profile)
    report = _collapse(subject, profile, top_k, asked.profile)
    if asked.wants_layers:
        from moesurgeon.pipeline.top_k import by_layer  # needs torch, which nothing else here does

        found = by_layer(subject.anatomy, profile, top_k, asked.average, progress)
        report["warnings"] += found.pop("warnings")
        report |= found
    return report


def write_divided(path: Path, divided: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write ``{"top_k": {LAYER: k}}`` of what :func:`foresee` ``divided`` to ``path``."""
    with whole_file(path, overwrite=overwrite) as part:
        part.write_text(json.dumps({"top_k": divided["top_k"]}, indent=2) + "\n", encoding="utf-8")


def _collapse(subject: Subject, profile: Profile, top_k: int, path: Path) -> dict[str, Any]:
    from moesurgeon.profiling.collapse import collapse_of, collapse_warnings

    statistics = profile.statistics
    if statistics.counts_only and top_k != statistics.top_k:
        raise ProfileError(
            f"{path} holds a server's counts of tokens, which do not say which expert a token prefers: profile "
            f"{subject.name} itself to tell what top-{top_k} does, or leave out --profile"
        )
    layers = collapse_of(statistics, top_k, has_bias=subject.anatomy.family.router.selection_bias)
    if layers is None:
        why = (
            f"whether routing collapses with top-{top_k} cannot be told: {subject.anatomy.family.title} chooses by "
            f"score and bias, and for that a profile counts the choices of top-1 and top-{statistics.top_k} only"
        )
        return {"collapse": None, "warnings": [why]}
    return {"collapse": layers, "warnings": collapse_warnings(statistics, top_k, layers)}
