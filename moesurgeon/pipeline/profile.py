"""``profile``: which experts the traces use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from moesurgeon.engine.device import place
from moesurgeon.engine.model import load_model
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.text import read_text, window_length
from moesurgeon.pipeline.write import refuse_output
from moesurgeon.profiling.artefact import FACTS, Origin, Profile, save_profile
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class ProfileOutput:
    """The folder of the profile; ``overwrite`` replaces an earlier profile."""

    output: Path
    overwrite: bool = False


def profile(
    source: str, output: ProfileOutput, text: Text, running: Running, progress: Progress = SILENT
) -> dict[str, Any]:
    """Profile ``source`` on the calibration split and write the artefact."""
    subject = open_subject(source)
    refuse_output(output.output, FACTS, overwrite=output.overwrite, sources=(subject.root,))
    placement = place(running.device, running.dtype, subject.stored_dtype)
    corpus = read_text(subject, text, builtin_split="calibration")
    length = window_length(subject, text)
    model = load_model(subject.checkpoint, subject.anatomy, placement)
    statistics = take_profile(model, subject.anatomy, corpus, length=length, progress=progress)
    origin = Origin(
        fingerprint=subject.fingerprint,
        family=subject.anatomy.family.name,
        splits=dict(corpus.splits),
        trace_hashes=dict(corpus.hashes),
        length=length,
        placement=str(placement),
        transformers=transformers.__version__,
    )
    taken = Profile(statistics, origin)
    save_profile(taken, output.output, overwrite=output.overwrite)
    return {"checkpoint": source, "path": str(output.output), **taken.summary()}
