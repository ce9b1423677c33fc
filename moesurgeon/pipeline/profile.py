"""``profile``: which experts the traces use."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import moesurgeon
from moesurgeon.engine.device import place
from moesurgeon.engine.ranks import Ranks, join_ranks
from moesurgeon.engine.state import WalkState
from moesurgeon.engine.streams import Stream
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.text import read_text, window_length
from moesurgeon.pipeline.walking import Ready, ready
from moesurgeon.pipeline.write import refuse_output
from moesurgeon.profiling.artefact import FACTS, Origin, Profile, save_profile
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class ProfileOutput:
    """The folder of the profile; ``overwrite`` replaces an earlier profile.

    ``resume``: where the checkpoint does not fit into memory, keep what a killed run needs to go on.
    """

    output: Path
    overwrite: bool = False
    resume: bool = True


def profile(
    source: str, output: ProfileOutput, text: Text, running: Running, progress: Progress = SILENT
) -> dict[str, Any]:
    """Profile ``source`` on the calibration split and write the artefact."""
    subject = open_subject(source)
    refuse_output(output.output, FACTS, overwrite=output.overwrite, sources=(subject.root,))
    placement = place(running.device, running.dtype, subject.stored_dtype)
    corpus = read_text(subject, text, builtin_split="calibration")
    length = window_length(subject, text)
    ranks = join_ranks(running.device)
    origin = Origin(
        fingerprint=subject.fingerprint,
        family=subject.anatomy.family.name,
        splits=dict(corpus.splits),
        trace_hashes=dict(corpus.hashes),
        length=length,
        placement=str(placement),
        transformers=transformers.__version__,
    )
    with ready([subject], corpus, placement, length=length, max_memory=running.max_memory) as walk:
        # All keep a state or none does, whatever memory each of them found.
        streams = not ranks.least(walk.is_resident)
        state = _state(output.output, origin, walk, ranks) if streams and output.resume else None
        statistics = take_profile(
            Stream(walk.sources[0]),
            corpus.domains,
            walk.batches,
            ranks=ranks,
            folder=walk.folder,
            state=state,
            progress=progress,
        )
        is_resident = walk.is_resident
    taken = Profile(statistics, origin)
    if ranks.is_first:
        save_profile(taken, output.output, overwrite=output.overwrite)
    ranks.least(1)  # it is written
    shutil.rmtree(_kept(output.output), ignore_errors=True)  # also of an attempt with less memory than this one
    return {"checkpoint": source, "path": str(output.output), "resident": is_resident, **taken.summary()}


def _state(output: Path, origin: Origin, walk: Ready, ranks: Ranks) -> WalkState:
    """Return the state beside ``output`` of a walk for the profile that ``origin`` describes."""
    shapes = [tuple(batch.tokens.shape) for batch in walk.batches]
    facts = [moesurgeon.__version__, torch.__version__, asdict(origin), shapes]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return WalkState(_kept(output), digest, ranks)


def _kept(output: Path) -> Path:
    """Return the folder of what a killed attempt at ``output`` left to go on with."""
    return output.with_name(f".{output.name}.walk")
