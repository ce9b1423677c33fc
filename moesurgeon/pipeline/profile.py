"""``profile``: which experts the traces use."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import moesurgeon
from moesurgeon.checkpoint.staging import refuse_unusable
from moesurgeon.engine.device import place
from moesurgeon.engine.ranks import Ranks, join_ranks
from moesurgeon.engine.state import WalkState
from moesurgeon.engine.streams import Stream
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.profile_extras import extras
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.text import cut_notes, file_facts, read_text, window_length
from moesurgeon.pipeline.walking import Ready, ready
from moesurgeon.profiling.all_experts import LIKELIEST, InnerSpec, inner_bytes
from moesurgeon.profiling.artefact import PROFILE, Origin, Profile, save_profile
from moesurgeon.profiling.inner import NAME as INNER
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.budgets import weights_of


@dataclass(frozen=True, kw_only=True)
class ProfileOutput:
    """The folder of the profile; ``overwrite`` replaces an earlier profile.

    ``resume``: where the checkpoint does not fit into memory, keep what a killed run needs to go on. ``inner``:
    run all experts (or each token's ``inner_experts`` likeliest) on so many tokens and keep their inner products.
    ``latency``: time the experts.
    """

    output: Path
    overwrite: bool = False
    resume: bool = True
    inner: int | None = None
    inner_experts: int = LIKELIEST
    latency: bool = False


def profile(
    source: str, output: ProfileOutput, text: Text, running: Running, progress: Progress = SILENT
) -> dict[str, Any]:
    """Profile ``source`` on the calibration split and write the artefact."""
    subject = open_subject(source)
    refuse_unusable(output.output, PROFILE, overwrite=output.overwrite, sources=(subject.root,))
    for odd in subject.odd_routers:  # before the work, so that it can be stopped
        progress.note(f"note: {odd}")
    placement = place(running.device, running.dtype, subject.stored_dtype)
    corpus = read_text(subject, text, builtin_split="calibration", progress=progress)
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
        weights=weights_of(corpus.domains, text.weights),
        sample=text.sample,
        chat_template=corpus.chat_template,
    )
    inner = _inner(output)
    with ready(
        [subject], corpus, placement, running, length=length, judges=False,
        always=None if inner is None else partial(inner_bytes, subject.anatomy, inner), ranks=ranks, progress=progress,
    ) as walk:  # fmt: skip
        # All keep a state or none does, whatever memory each of them found.
        streams = not ranks.least(walk.is_resident)
        state = _state(output, origin, walk, ranks) if streams and output.resume else None
        stream = Stream(walk.sources[0])
        with extras(
            stream, corpus.domains, walk.batches, inner, latency=output.latency, ranks=ranks,
            folder=state.folder if state else _kept(output.output), stays=state is not None, progress=progress,
        ) as more:  # fmt: skip
            statistics = take_profile(
                stream,
                corpus.domains,
                walk.batches,
                ranks=ranks,
                folder=walk.folder,
                state=state,
                extras=list(more),
                progress=progress,
            )
            taken = Profile(statistics, origin, *more.found())
            if ranks.is_first:
                save_profile(taken, output.output, overwrite=output.overwrite)
        is_resident, memory = walk.is_resident, walk.memory.as_dict()
    ranks.least(1)  # it is written
    shutil.rmtree(_kept(output.output), ignore_errors=True)  # also of an attempt with less memory than this one
    return {
        "checkpoint": source,
        "path": str(output.output),
        "resident": is_resident,
        "memory": memory,
        "cut": corpus.cut,
        "files": file_facts(corpus),
        "notes": [*cut_notes(subject, text, corpus), *subject.odd_routers],
        **taken.summary(),
    }


def _inner(output: ProfileOutput) -> InnerSpec | None:
    return None if output.inner is None else InnerSpec(tokens=output.inner, experts=output.inner_experts)


def _state(output: ProfileOutput, origin: Origin, walk: Ready, ranks: Ranks) -> WalkState:
    """Return the state beside ``output`` of a walk for the profile that ``origin`` describes."""
    wanted = [output.inner, output.inner_experts, output.latency]
    facts = [moesurgeon.__version__, torch.__version__, asdict(origin), wanted]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    # The traces' hashes say nothing of how much of them was read.
    for batch in walk.batches:
        digest.update(f"{batch.domain} {[len(window.tokens) for window in batch.windows]}".encode())
        for window in batch.windows:
            digest.update(window.tokens.tobytes())
    state = WalkState(_kept(output.output), digest.hexdigest(), ranks)
    if output.inner is not None and ranks.is_first and not (state.folder / INNER).is_file():
        shutil.rmtree(state.folder)  # layers that are done without their inner products are not
        state = WalkState(_kept(output.output), digest.hexdigest(), ranks)
    return state


def _kept(output: Path) -> Path:
    """Return the folder of what a killed attempt at ``output`` left to go on with."""
    return output.with_name(f".{output.name}.walk")
