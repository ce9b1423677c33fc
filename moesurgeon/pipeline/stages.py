"""A cut in stages: cut, profile again, heal, judge on text that was not learnt from, accept or roll back.

No stage writes a checkpoint. A stage is an overlay on the source, and what it made anew waits in the folder of
stages (``stage_folder``); the accepted end is written once. A search tries counts, each as a cut of its own from
the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import moesurgeon
from moesurgeon.checkpoint.staging import overlap, refuse_place
from moesurgeon.errors import GateFailed, NothingToDo, UsageError
from moesurgeon.evaluation.figures import figures_of
from moesurgeon.evaluation.gate import Gate, failure
from moesurgeon.evaluation.summary import summarise
from moesurgeon.pipeline.choice import Choice, choose, choose_by, plan_chosen
from moesurgeon.pipeline.choice_check import check_choice, check_choice_by, check_choice_on, profile_of
from moesurgeon.pipeline.evaluate import EvaluateSpec, read_gate, refuse_unknown_intervals
from moesurgeon.pipeline.explained import explain_choice
from moesurgeon.pipeline.heal import Healer, healer
from moesurgeon.pipeline.healed_choice import settled
from moesurgeon.pipeline.known_text import counted
from moesurgeon.pipeline.options import HealSpec, Running, Writing
from moesurgeon.pipeline.prune_spec import HEALED, PruneSpec
from moesurgeon.pipeline.stage_folder import StageFolder, stage_folder
from moesurgeon.pipeline.stage_plan import any_cut, planned
from moesurgeon.pipeline.stage_profile import stage_profile
from moesurgeon.pipeline.stage_state import State, counts_of, heal_of, of_count
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.text import trace_specs, window_length
from moesurgeon.pipeline.write import finish, refuse_full, refuse_output
from moesurgeon.progress import Progress
from moesurgeon.surgery.prune import with_mtp_layers


def prune_in_stages(
    subject: Subject, spec: PruneSpec, writing: Writing, progress: Progress, running: Running
) -> dict[str, Any]:
    """Write ``subject`` as its last accepted stage leaves it; the report's ``gate`` says if a later one failed.

    Raises GateFailed, and writes nothing, where not even the first stage passes.
    """
    anatomy = subject.anatomy
    refuse_output(writing, subject.root)
    if spec.run is not None and any(overlap(spec.run, other) for other in (subject.root, writing.output)):
        raise UsageError(f"--run {spec.run} overlaps with the source or the output; name a folder of its own")
    if spec.run is not None:
        refuse_place(spec.run, "--run")
    heal = heal_of(spec)
    _refuse_choice(subject, spec, heal)
    gate = read_gate(subject, heal.judging, EvaluateSpec(gates=spec.gates), has_teacher=True)
    counts = _by_file(subject, spec) or counts_of(anatomy, spec)
    if writing.dry_run:
        return planned(subject, spec, counts, writing, progress)
    first = State.of_source(anatomy)
    if min(counts) == anatomy.experts and not writing.allow_noop:
        raise NothingToDo(f"nothing to prune: all {anatomy.experts} experts of every layer would stay; keep fewer")
    like, least = (any_cut(anatomy, count) for count in (max(counts), min(counts)))
    refuse_full(writing.output, 0 if writing.link else least.nbytes)
    folder = spec.run or writing.output.with_name(f".{writing.output.name}.stages")
    with healer(subject, heal, running, progress, like=like, choosing=spec.criterion == HEALED) as open_healer:
        refuse_unknown_intervals(gate, open_healer.judge, has_teacher=True)
        digest = _digest(subject, spec, open_healer)
        with stage_folder(folder, digest, stays=spec.run is not None) as stages:
            work = _Stages(subject, spec, open_healer, stages, gate, progress)
            end = work.search(first, counts) if spec.search else work.one_by_one(first, counts)
            return {**work.report(end), **finish(end.plan, subject, writing, progress)}


def _refuse_choice(subject: Subject, spec: PruneSpec, heal: HealSpec) -> None:
    """Raise now what choosing would raise after a profile, or after the stages before."""
    check_choice(spec)
    if spec.profile is not None and spec.keep_experts is None:
        check_choice_by(spec, profile_of(spec.profile, subject, subject.anatomy), subject.anatomy)
    if spec.keep_experts is None and (spec.profile is None or spec.stages is not None):  # profiled on what heals
        domains = [each.domain for each in trace_specs(heal.text)]
        check_choice_on(spec, domains, window_length(subject, heal.text))


class _Stages:
    """The stages of one cut, judged by ``gate`` (None: each is accepted)."""

    def __init__(
        self,
        subject: Subject,
        spec: PruneSpec,
        open_healer: Healer,
        folder: StageFolder,
        gate: Gate | None,
        progress: Progress,
    ) -> None:
        self._subject, self._spec, self._healer = subject, spec, open_healer
        self._folder, self._gate, self._progress = folder, gate, progress
        self._lines: list[dict[str, Any]] = []

    def one_by_one(self, state: State, counts: tuple[int, ...]) -> State:
        """Return the state after the last stage that passes."""
        for number, count in enumerate(counts, start=1):
            after = self._attempt(f"stage-{number:02d}", state, count)
            if after is None:
                if number == 1:
                    self._nothing_passed()
                break
            state = after
        return state

    def search(self, source: State, counts: tuple[int, ...]) -> State:
        """Return the cut to the smallest of ``counts`` (falling) that passes, if what is above it does as well.

        Bisection: a count counts as failed once a larger one has failed.
        """
        passing, best, low, high = None, "", 0, len(counts)
        while low < high:  # counts[:low] pass, counts[high:] fail
            middle = (low + high) // 2
            name = f"count-{counts[middle]:04d}"
            after = self._attempt(name, source, counts[middle])
            if after is None:
                high = middle
                continue
            if best:
                self._folder.forget(best)
            passing, best, low = after, name, middle + 1
        if passing is None:
            self._nothing_passed()
        assert passing is not None
        return passing

    def report(self, end: State) -> dict[str, Any]:
        """Return what ``prune`` reports of the stages that led to ``end``."""
        accepted = [line for line in self._lines if line["accepted"]]
        last = min(accepted, key=lambda line: line["experts_after"])
        judged = last if self._spec.search else self._lines[-1]
        experts = self._subject.anatomy.experts
        return {
            "kept": {str(layer): list(left) for layer, left in end.left.items()},
            "dropped": {
                str(layer): [expert for expert in range(experts) if expert not in left]
                for layer, left in end.left.items()
            },
            "experts_before": experts,
            "experts_after": end.anatomy.experts,
            "virtual": False,
            "criterion": last["criterion"],
            "stages": self._lines,
            "healing": last["healing"],
            "healed": last["healed"],
            "warnings": [f"{line['stage']}: {warning}" for line in accepted for warning in line["warnings"]],
            **({"gate": judged["gate"]} if self._gate else {}),
        }

    def _attempt(self, name: str, state: State, count: int) -> State | None:
        """Cut ``state`` to ``count`` experts, heal and judge; return the new state, None if it is rolled back."""
        known = self._folder.judged(name)
        if known is None:
            known = self._judge(name, state, count)
        else:
            self._progress.note(f"{name}: judged before, {'accepted' if known['accepted'] else 'rolled back'}")
            self._warn(name, known["warnings"])
        self._lines.append(known)
        if not known["accepted"] or (self._spec.search and not (self._folder.path / name).exists()):
            return None if not known["accepted"] else state  # forgotten: a smaller count passed since
        kept, how = self._folder.choice(name)
        cut = state.cut(kept, how)
        return cut.with_healed(self._folder.healed(name, cut.anatomy))

    def _judge(self, name: str, state: State, count: int) -> dict[str, Any]:
        self._progress.note(f"{name}: {state.anatomy.experts} -> {count} experts per layer")
        choice = self._chosen(name, state, count)
        self._warn(name, choice.warnings)
        kept = with_mtp_layers(state.anatomy, choice.kept)
        cut = state.cut(kept, choice.record)
        plan, healed, measured = self._healer.heal(cut.plan)
        figures = summarise(measured)
        verdict = self._gate.judge(figures_of(figures)) if self._gate else None
        accepted = verdict is None or bool(verdict["passed"])
        line = {
            "accepted": accepted,
            "experts_before": state.anatomy.experts,
            "experts_after": count,
            "kept": {str(layer): list(left) for layer, left in cut.left.items()},
            "dropped": {
                str(layer): [expert for expert in state.left[layer] if expert not in left]
                for layer, left in cut.left.items()
            },
            **counted(choice.record),
            "evidence": choice.evidence,
            "warnings": choice.warnings,
            "healing": healed.pop("layers"),
            "healed": healed,
            "judged": figures,
            **({"gate": verdict} if verdict else {}),
        }
        if accepted:
            how = choice.record if healed["kept"] else {**choice.record, **self._healer.unused}
            self._folder.accept(name, line, kept, how, plan)
        else:
            self._progress.note(f"{name}: rolled back, {failure(verdict or {})}")
            self._folder.reject(name, line)
        return self._folder.entries[-1]

    def _warn(self, name: str, warnings: Sequence[str]) -> None:
        """Say what speaks against a choice before the stage is healed."""
        for warning in warnings:
            self._progress.note(f"note: {name}: {warning}")

    def _chosen(self, name: str, state: State, count: int) -> Choice:
        """Choose by the profile that was given, for the source; by a new one of the overlay for what came of it."""
        spec = of_count(self._spec, count)
        is_source = state.anatomy.experts == self._subject.anatomy.experts
        if is_source and spec.keep_experts is not None:
            return choose(self._subject, self._spec, self._progress)
        if is_source and spec.profile is not None:
            choice = choose(self._subject, spec, self._progress)
        else:
            place = self._folder.path / ("profile" if is_source else f"{name}.profile")
            profile = stage_profile(
                self._healer, state.plan, place, self._subject.fingerprint, spec.criterion, self._progress
            )
            choice = choose_by(state.anatomy, spec, profile, self._progress)
            if choice.unsettled is None:
                why = explain_choice(state.anatomy, profile, choice.kept, choice.record["criterion"], spec.seed)
                choice = replace(choice, evidence={**choice.evidence, **why})
        if choice.unsettled is None:
            return choice
        return settled(choice, self._healer, state.anatomy, None if is_source else state.plan)

    def _nothing_passed(self) -> None:
        verdict = self._lines[-1]["gate"]
        raise GateFailed(
            f"{failure(verdict)} already with {max(line['experts_after'] for line in self._lines)} of "
            f"{self._subject.anatomy.experts} experts; nothing was written: cut or ask for less, or heal on more text",
            verdict,
        )


def _by_file(subject: Subject, spec: PruneSpec) -> tuple[int, ...] | None:
    """Return the one count that a file with the choice leaves; None without such a file, or for more than it says."""
    if spec.keep_experts is None or spec.stages is not None or spec.search:
        return None
    return (plan_chosen(subject.anatomy, choose(subject, spec), spec).result(subject.anatomy).experts,)


def _digest(subject: Subject, spec: PruneSpec, open_healer: Healer) -> str:
    """Return a hash of all that the stages depend on."""
    facts: dict[str, Any] = {
        "version": moesurgeon.__version__,
        "source": subject.fingerprint,
        "spec": {name: value for name, value in asdict(spec).items() if name != "run"},
        "files": [_content(path) for path in (spec.profile, spec.keep_experts)],
        **open_healer.facts(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _content(path: Path | None) -> str | None:
    """Return a hash of a file, or of the files in a folder."""
    if path is None or not path.exists():
        return None
    digest = hashlib.sha256()
    for each in _files(path):
        with each.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
