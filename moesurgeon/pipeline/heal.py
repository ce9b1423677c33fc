"""Healing what an edit plan damages, before anything is written: the cut and its repair are one plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moesurgeon.engine.batches import BATCH_TOKENS, Batch, batches_of, rows_for
from moesurgeon.engine.budget import share_out
from moesurgeon.engine.device import place
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.errors import UsageError
from moesurgeon.evaluation.measure import LOSS, TEACHER_LOSS, measure
from moesurgeon.healing.heal import heal, refuse_quantised
from moesurgeon.healing.memory import healing_bytes
from moesurgeon.healing.pace import METHODS
from moesurgeon.healing.planned import plan_healed
from moesurgeon.healing.room import Room
from moesurgeon.pipeline.options import HealSpec, Running, Text
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.text import read_text, trace_specs, window_length
from moesurgeon.pipeline.walking import hidden_folder
from moesurgeon.progress import Progress
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.traces.windows import Corpus


def check_heal(spec: HealSpec) -> None:
    """Raise UsageError for what no healing can be done with; reads nothing."""
    if spec.method not in METHODS:
        raise UsageError(f"--heal-method {spec.method} is not one of {', '.join(METHODS)}")
    trace_specs(Text(traces=spec.traces))


@contextmanager
def healed(
    plan: EditPlan, subject: Subject, spec: HealSpec, running: Running, progress: Progress
) -> Iterator[tuple[EditPlan, dict[str, Any]]]:
    """Yield ``plan`` with healed tensors, and the report: errors by layer, held-out loss before and after.

    The final judge is the loss on held-out text: where healing does not lower it, the plan comes back as it was.
    To be written inside the context: what was healed may be in files that end with it.
    """
    check_heal(spec)
    other = _teacher(subject, spec)
    placement = place(running.device, running.dtype, subject.stored_dtype)
    text = Text(traces=spec.traces, max_tokens=spec.max_tokens, length=spec.length)
    length = window_length(subject, text)
    train = read_text(subject, text, builtin_split="calibration", own_split="train")
    judge = read_text(
        subject, replace(text, max_tokens=spec.heldout_tokens, split="validation"), builtin_split="validation"
    )

    def batched(corpus: Corpus) -> list[Batch]:
        return list(batches_of(corpus, rows=rows_for(length), tokens=BATCH_TOKENS, device=placement.device))

    learn, held = batched(train), batched(judge)
    with ExitStack() as stack:
        sources = [
            stack.enter_context(Source.of_checkpoint(each.checkpoint, each.anatomy, placement))
            for each in (subject, *([other] if other else []))
        ]
        teacher, student = Stream(sources[-1]), Stream(sources[0], Overlay(plan=plan))
        if spec.method != "none":
            refuse_quantised(student)
        fits = _share_out(sources, student, spec, running, [*learn, *held])
        folder: Path | None = stack.enter_context(hidden_folder(fits))
        bare = _losses(student, teacher, judge, held, folder, progress)
        layers, after = [], bare
        if spec.method != "none":
            walk = Walk([teacher, student], [*learn, *held], folder)
            numbers = range(len(learn)), range(len(learn), len(learn) + len(held))
            room = Room(folder)
            layers = heal(
                walk, student, teacher, *numbers, method=spec.method, pace=spec.pace, room=room, progress=progress
            )
            del walk  # and its hidden states
            after = _losses(student, teacher, judge, held, folder, progress)
        kept = after["loss"] < bare["loss"]
        report = {
            "method": spec.method,
            "teacher": (other or subject).fingerprint,
            "traces": dict(train.hashes),
            "heldout_traces": dict(judge.hashes),
            "tokens": sum(train.tokens.values()),
            "heldout_tokens": sum(judge.tokens.values()),
            "layers": layers,
            "heldout": {"teacher": bare["teacher"], "bare": bare["loss"], "healed": after["loss"]},
            "gap_closed": _closed(bare, after),
            "kept": kept,
        }
        record = {key: report[key] for key in ("method", "teacher", "traces", "heldout_traces", "heldout")}
        yield plan_healed(student, {**record, "pace": asdict(spec.pace)}) if kept else plan, report


def _teacher(subject: Subject, spec: HealSpec) -> Subject | None:
    """Return the teacher, if it is another checkpoint than ``subject``; UsageError for one that cannot be."""
    other = open_subject(spec.teacher) if spec.teacher else None
    if other is None or other.fingerprint == subject.fingerprint:
        return None
    mine, theirs = subject.anatomy, other.anatomy
    if (mine.layers, mine.hidden) != (theirs.layers, theirs.hidden):
        raise UsageError(
            f"{spec.teacher} has {theirs.layers} layers of width {theirs.hidden}, {subject.name} has {mine.layers} of "
            f"{mine.hidden}: no teacher for it; give the checkpoint that it was made from"
        )
    return other


def _share_out(
    sources: Sequence[Source], student: Stream, spec: HealSpec, running: Running, batches: Sequence[Batch]
) -> bool:
    """Divide the memory as ``engine.budget`` does, both streams' states and all that healing takes included."""
    takes = healing_bytes(student, spec.method, spec.pace, batches)
    walking = batches if len(sources) == 2 else [*batches, *batches]
    try:
        return share_out(running.max_memory, sources, walking, work=takes.work, held=takes.held)
    except UsageError as error:
        if spec.method != "distill":
            raise
        less = healing_bytes(student, "ridge", spec.pace, batches).work
        raise UsageError(
            f"{error}; distilling a layer takes {takes.work:,} bytes with its gradients and optimiser state, "
            f"--heal-method ridge takes {less:,}"
        ) from error


def _losses(
    student: Stream, teacher: Stream, corpus: Corpus, batches: Sequence[Batch], folder: Path | None, progress: Progress
) -> dict[str, float]:
    measured = measure(
        student, corpus.domains, batches, teacher=teacher, folder=folder, progress=progress, label="judging"
    )
    totals, count = measured.sums.sum(axis=0), float(measured.positions.sum())
    return {"loss": float(totals[LOSS] / count), "teacher": float(totals[TEACHER_LOSS] / count)}


def _closed(bare: dict[str, float], after: dict[str, float]) -> float | None:
    """Return the share of the held-out loss gap to the teacher that was closed."""
    gap = bare["loss"] - bare["teacher"]
    return (bare["loss"] - after["loss"]) / gap if gap > 0 else None
