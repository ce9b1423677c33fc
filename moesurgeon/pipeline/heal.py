"""Healing what an edit plan damages, before anything is written: the cut and its repair are one plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from moesurgeon.engine.batches import Batch, batches_of, rows_for
from moesurgeon.engine.device import place
from moesurgeon.engine.memory_use import MemoryUse
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.errors import UsageError
from moesurgeon.evaluation.decidable import gap_closed, gap_of, losses_of
from moesurgeon.evaluation.measure import Measurement, measure
from moesurgeon.healing.heal import heal, refuse_quantised
from moesurgeon.healing.pace import METHODS
from moesurgeon.healing.planned import plan_healed
from moesurgeon.healing.room import Room
from moesurgeon.pipeline.heal_budget import share_out_healing
from moesurgeon.pipeline.heal_teacher import teacher_of
from moesurgeon.pipeline.healed_choice import HELDOUT_TOKENS, TOKENS, Fixed, LayerChoice, Starts, choose_healed
from moesurgeon.pipeline.healing_text import facts_of, healing_text, say_amounts
from moesurgeon.pipeline.known_text import UNUSED, record_of, refuse_known_validation
from moesurgeon.pipeline.options import HealSpec, Running
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.text import trace_specs, window_length
from moesurgeon.pipeline.walking import hidden_folder
from moesurgeon.progress import Progress
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.traces.windows import Corpus


def check_heal(spec: HealSpec) -> None:
    """Raise UsageError for what no healing can be done with; reads nothing."""
    if spec.method not in METHODS:
        raise UsageError(f"--heal-method {spec.method} is not one of {', '.join(METHODS)}")
    trace_specs(spec.text)
    trace_specs(spec.judging)


class Healer:
    """A checkpoint, its teacher and the text, opened once: heals any plan for the checkpoint and judges it.

    ``learn`` and ``held`` are the batches that heal and that judge; ``folder`` is where to put what does not fit
    into memory, None if all does.
    """

    def __init__(
        self,
        subject: Subject,
        spec: HealSpec,
        sources: Sequence[Source],
        corpora: tuple[Corpus, Corpus],
        batches: tuple[list[Batch], list[Batch]],
        folder: Path | None,
        *,
        memory: MemoryUse,
        teacher: Subject,
        progress: Progress,
    ) -> None:
        self.subject, self.spec, self.folder = subject, spec, folder
        self.train, self.judge = corpora
        self.learn, self.held = batches
        self._student_source, self._teacher_name = sources[0], teacher.fingerprint
        self.teacher = Stream(sources[-1])
        self._memory, self._progress = memory, progress

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return window_length(self.subject, self.spec.text)

    @cached_property
    def documents(self) -> dict[str, Any]:
        """What a record says of the documents that heal and that judge."""
        return record_of(self.train, self.judge)

    def facts(self) -> dict[str, Any]:
        """Return what a result depends on besides the checkpoint and ``spec``: teacher, text, place and precision, and
        to rounding what is computed at once."""
        scratch = self._memory.scratch
        return {
            "at_once": [scratch.tokens, scratch.positions],
            "teacher": self._teacher_name,
            "traces": dict(self.train.hashes),
            "heldout_traces": dict(self.judge.hashes),
            "placement": str(self._student_source.placement),
        }

    def student(self, plan: EditPlan) -> Stream:
        """Return what ``plan`` makes of the checkpoint, ready to walk."""
        return Stream(self._student_source, Overlay(plan=plan))

    def judged(self, student: Stream) -> Measurement:
        """Return the losses of ``student`` and of the teacher on the text that judges."""
        return measure(
            student,
            self.judge.domains,
            self.held,
            teacher=self.teacher,
            folder=self.folder,
            progress=self._progress,
            label="judging",
        )

    def choose(
        self,
        plan: EditPlan | None,
        count: int,
        *,
        starts: Starts,
        fixed: Fixed | None = None,
    ) -> dict[int, LayerChoice]:
        """Return by layer which ``count`` experts of what ``plan`` makes (None: of the checkpoint) leave least.

        Least after the refit, on this text. ``starts`` and ``fixed`` are in the numbering of the plan's result.
        """
        changes = plan is not None and not plan.changes_nothing
        stream = Stream(self._student_source, Overlay(plan=plan) if changes else None)
        itself = not changes and self.teacher.source is self._student_source
        teacher = None if itself else self.teacher
        streams = [stream] if teacher is None else [teacher, stream]
        walk = Walk(streams, [*self.learn, *self.held], self.folder)
        return choose_healed(
            walk,
            stream,
            range(len(self.learn)),
            range(len(self.learn), len(walk.batches)),
            count,
            teacher=teacher,
            fixed=fixed,
            starts=starts,
            progress=self._progress,
        )

    def choice_text(self) -> dict[str, Any]:
        """Return on what :meth:`choose` rests: hashes of the text, and how many tokens of a layer were sampled."""
        train, judge = (sum(corpus.tokens.values()) for corpus in (self.train, self.judge))
        return {
            "choice_traces": dict(self.train.hashes),
            "choice_heldout_traces": dict(self.judge.hashes),
            "choice_tokens": min(TOKENS, train),
            "choice_heldout_tokens": min(HELDOUT_TOKENS, judge),
        }

    def heal(self, plan: EditPlan) -> tuple[EditPlan, dict[str, Any], Measurement]:
        """Return ``plan`` with healed tensors, the report (errors by layer, losses), and what judged the result.

        The final judge is the loss on held-out text: where healing does not lower it, the plan comes back as it was.
        The tensors of the plan may be in files of ``folder``.
        """
        spec, student = self.spec, self.student(plan)
        before = after = self.judged(student)
        gap = gap_of(before)
        if gap.warning:
            self._progress.note(f"note: {gap.warning}")
        layers: list[dict[str, Any]] = []
        if spec.method != "none" or spec.merge:
            layers, after = self._walked(student, merge=spec.merge)
        bare, healed, merging = losses_of(before), losses_of(after), {}
        if is_merged := any(step["step"] == "merge" and step["kept"] for layer in layers for step in layer["steps"]):
            # Better in every layer is not yet better as a whole.
            merging = {"merged": healed["loss"], "unmerged": bare["loss"]}
            if spec.method != "none":
                other = self.student(plan)
                other_layers, other_after = self._walked(other, merge=False, name="unmerged.")
                unmerged = losses_of(other_after)
                merging["unmerged"] = unmerged["loss"]
                if unmerged["loss"] <= healed["loss"]:
                    for one, tried in zip(other_layers, layers, strict=True):
                        merges = [step for step in tried["steps"] if step["step"] == "merge"]
                        one["steps"][:0] = [{**step, "kept": False} for step in merges]
                    student, layers, after, is_merged = other, other_layers, other_after, False
                    healed = unmerged
        kept = healed["loss"] < bare["loss"]
        report = {
            "method": spec.method,
            **({"merge": is_merged and kept} if spec.merge else {}),
            "teacher": self._teacher_name,
            "traces": dict(self.train.hashes),
            "heldout_traces": dict(self.judge.hashes),
            "tokens": sum(self.train.tokens.values()),
            "heldout_tokens": sum(self.judge.tokens.values()),
            "text": facts_of(self.train, self.judge),
            "gap": gap.as_dict(),
            "warnings": [gap.warning] if gap.warning else [],
            "layers": layers,
            "heldout": {"teacher": bare["teacher"], "bare": bare["loss"], "healed": healed["loss"], **merging},
            "gap_closed": gap_closed(bare, healed),
            "kept": kept,
            "memory": self._memory.as_dict(),
        }
        if not kept:
            return self._unhealed(plan), report, before
        record = {key: report[key] for key in ("method", "teacher", "traces", "heldout_traces", "heldout")}
        record["documents"] = self.documents
        if is_merged:
            record["merge"] = True
        return plan_healed(student, {**record, "pace": asdict(spec.pace)}), report, after

    @property
    def unused(self) -> dict[str, Any]:
        """Return what the record of a cut says of this text where the healing was left out."""
        fits = self.spec.method != "none" or self.spec.merge
        return {UNUSED: self.documents if fits else {**self.documents, "calibration": ""}}

    def _unhealed(self, plan: EditPlan) -> EditPlan:
        """Return ``plan``, with the text that was read to heal it in its record."""
        if (self.spec.method == "none" and not self.spec.merge) or not plan.record:
            return plan
        return replace(plan, record=[*plan.record[:-1], {**plan.record[-1], **self.unused}])

    def _walked(self, student: Stream, *, merge: bool, name: str = "") -> tuple[list[dict[str, Any]], Measurement]:
        """Heal ``student``; return the report by layer, and what judged it. ``name``: of its files."""
        walk = Walk([self.teacher, student], [*self.learn, *self.held], self.folder)
        layers = heal(
            walk,
            student,
            self.teacher,
            range(len(self.learn)),
            range(len(self.learn), len(walk.batches)),
            method=self.spec.method,
            pace=self.spec.pace,
            merge=merge,
            room=Room(self.folder, name),
            progress=self._progress,
        )
        del walk  # and its hidden states
        return layers, self.judged(student)


@contextmanager
def healer(
    subject: Subject, spec: HealSpec, running: Running, progress: Progress, *, like: EditPlan, choosing: bool = False
) -> Iterator[Healer]:
    """Open what healing plans of ``subject`` takes; memory is shared out for such as ``like``.

    ``choosing``: and for :meth:`Healer.choose`.
    """
    check_heal(spec)
    other = teacher_of(subject, spec, progress)
    placement = place(running.device, running.dtype, subject.stored_dtype)
    train, judge = healing_text(subject, spec, progress)
    refuse_known_validation(subject, judge)
    say_amounts(train, judge, progress)
    with ExitStack() as stack:
        sources = [
            stack.enter_context(Source.of_checkpoint(each.checkpoint, each.anatomy, placement))
            for each in (subject, *([other] if other else []))
        ]
        student = Stream(sources[0], Overlay(plan=like))
        if spec.method != "none" or spec.merge:
            refuse_quantised(student)

        @cache
        def batched(tokens: int) -> tuple[list[Batch], list[Batch]]:
            learn, held = (_batched(each, sources[0], subject, spec, tokens) for each in (train, judge))
            return learn, held

        def all_of(tokens: int) -> list[Batch]:
            return [batch for each in batched(tokens) for batch in each]

        trials = TOKENS + HELDOUT_TOKENS if choosing else 0
        memory = share_out_healing(sources, student, spec, running, all_of, trials)
        folder: Path | None = stack.enter_context(hidden_folder(not memory.hidden_in_files))
        if memory.note:
            progress.note(memory.note)
        yield Healer(
            subject, spec, sources, (train, judge), batched(memory.scratch.tokens), folder,
            memory=memory, teacher=other or subject, progress=progress,
        )  # fmt: skip


@contextmanager
def healed(
    plan: EditPlan,
    subject: Subject,
    spec: HealSpec,
    running: Running,
    progress: Progress,
    opened: Healer | None = None,
) -> Iterator[tuple[EditPlan, dict[str, Any]]]:
    """Yield ``plan`` with healed tensors, and the report: errors by layer, held-out loss before and after.

    To be written inside the context: what was healed may be in files that end with it, or with what is ``opened``.
    """
    with nullcontext(opened) if opened else healer(subject, spec, running, progress, like=plan) as open_healer:
        better, report, _judged = open_healer.heal(plan)
        yield better, report


def _batched(corpus: Corpus, source: Source, subject: Subject, spec: HealSpec, tokens: int) -> list[Batch]:
    rows = rows_for(window_length(subject, spec.text), tokens)
    return list(batches_of(corpus, rows=rows, tokens=tokens, device=source.placement.device))
