"""What of a recipe cannot be done, told before its first step: from headers, and from the text that it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moesurgeon.checkpoint.staging import overlap, refuse_place, refuse_unusable
from moesurgeon.engine import device
from moesurgeon.errors import MoeSurgeonError, NothingToDo, UsageError
from moesurgeon.pipeline.choice import choice_of_file, plan_chosen
from moesurgeon.pipeline.choice_check import check_choice, check_choice_by, check_choice_on, profile_of
from moesurgeon.pipeline.evaluate import EvaluateSpec, read_gate
from moesurgeon.pipeline.foresight import Foresight, foresee
from moesurgeon.pipeline.heal_check import refuse_unhealable
from moesurgeon.pipeline.options import HealSpec, Writing
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recipe import ProfileStep, Recipe, RecoverStep, RetopStep, Step
from moesurgeon.pipeline.recipe_steps import recovery_of, step_on
from moesurgeon.pipeline.recipe_text import RecipeText
from moesurgeon.pipeline.recipe_text_check import refuse_unusable_text
from moesurgeon.pipeline.recover_adapter import refuse_adapter
from moesurgeon.pipeline.recover_check import check_training
from moesurgeon.pipeline.run_folder import RUN
from moesurgeon.pipeline.sample import refuse_unsampled
from moesurgeon.pipeline.stage_state import counts_of, heal_of
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.text import trace_specs, window_length
from moesurgeon.pipeline.write import refuse_full
from moesurgeon.selection.choose import best, count_to_keep
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import Kept, check_count, plan_prune
from moesurgeon.surgery.retop import plan_retop
from moesurgeon.surgery.virtual import refuse_without_bias


def refuse_impossible(recipe: Recipe, output: Path, text: RecipeText) -> None:
    """Raise now what a step would raise after the work of those before it; ``text`` says where it is written."""
    with _at(text, "checkpoint"):
        subject = open_subject(recipe.checkpoint)
    refuse_unusable(output, RUN, overwrite=True, sources=(subject.root,))
    with _at(text, "running"):
        device.place(recipe.running.device, recipe.running.dtype, subject.stored_dtype)
    with _at(text, "text"):
        window_length(subject, recipe.text)
        trace_specs(recipe.text.calibrating)
        reported = recipe.text.reported(recipe.report_tokens)
        trace_specs(reported)
    if recipe.gate:
        with _at(text, "gate"):
            read_gate(subject, reported, EvaluateSpec(gates=(recipe.gate,)), has_teacher=True)
    steps = _Steps(recipe, subject, output)
    for number, step in enumerate(recipe.steps):
        with _at(text, "steps", number, step.name):
            steps.check(step)
    refuse_full(output, steps.nbytes)
    with _at(text, "text"):
        refuse_unusable_text(recipe, subject)


@contextmanager
def _at(text: RecipeText, *place: str | int) -> Iterator[None]:
    """Say of an error where in the recipe it is."""
    try:
        yield
    except MoeSurgeonError as error:
        error.args = (f"{text.at(place)}: {'.'.join(map(str, place))}: {error}",)
        raise


@dataclass
class _Steps:
    """What is known of the state before each step.

    ``anatomy``: of that state; ``is_known``: not where a profile or a gate is to say how many experts stay. ``taken``:
    the profile of it that there will be. ``own``: the kinds of text that were sampled. ``nbytes``: of the checkpoints.
    """

    recipe: Recipe
    subject: Subject
    output: Path

    def __post_init__(self) -> None:
        self.anatomy: Anatomy = self.subject.anatomy
        self.is_known, self.is_original = True, True
        self.taken: ProfileStep | None = None
        self.own: list[str] = []
        self.written: list[Path] = []
        self.nbytes = 0

    def check(self, step: Step) -> None:
        """Raise what ``step`` would raise; go on to the state behind it."""
        if step.sample:
            self._sample(step)
            return
        if step.profile:
            self.taken = step.profile
            return
        step = step_on(self.recipe, step)
        if step.heal:
            self._heal(step.heal)
        plan: EditPlan | None = None
        if step.retop:
            plan = self._retop(step.retop)
        elif step.prune:
            plan = self._prune(step.prune)
        elif step.recover:
            self._recover(step.recover)
        if plan is not None:
            self.anatomy = plan.result(self.anatomy)
        if self.is_known:
            self.nbytes += sum(tensor.nbytes for tensor in self.anatomy.tensors.values())
        self.is_original, self.taken = False, None

    def _sample(self, step: Step) -> None:
        assert step.sample is not None
        refuse_unsampled(self.subject, step.sample, self.recipe.running)
        if step.sample.tokens <= step.sample.length:
            raise UsageError(
                f"{step.sample.tokens} tokens can be a single text of {step.sample.length}, and text that heals and "
                "judges is two at least; raise tokens, or lower length"
            )
        self.own.append(step.sample.domain)

    def _heal(self, spec: HealSpec) -> None:
        if spec.teacher is not None and overlap(Path(spec.teacher), self.output):  # a stage is not there yet
            spec = replace(spec, teacher=None)
        refuse_unhealable(self.subject, spec, self.recipe.running)
        for trace in trace_specs(spec.text):
            if trace.domain in self.own:
                raise UsageError(f"{trace.domain} is what sample writes: give the trace {trace.location} another name")

    def _retop(self, step: RetopStep) -> EditPlan:
        if step.heal and step.heal.merge:
            raise UsageError("heal: {merge: true} is for prune: retop drops no experts that could be folded")
        plan = plan_retop(self.anatomy, step.spec)
        if plan.changes_nothing:
            raise NothingToDo(f"the checkpoint is top-{step.top_k} by then, so nothing would change; remove the step")
        if step.profile is not None:
            profile_of(step.profile, self.subject if self.is_original else None, self.anatomy)
            if self.is_original:
                foresee(self.subject, step.top_k, Foresight(profile=step.profile))
        return plan

    def _prune(self, spec: PruneSpec) -> EditPlan | None:
        """Return a plan with as many experts as there will be; None if that is for the profile or the gate to say."""
        check_choice(spec)
        if spec.is_staged:
            self._stages(spec)
        if spec.keep_experts is not None:
            choice = choice_of_file(spec, spec.keep_experts)
            if spec.profile is not None:
                profile_of(spec.profile, self.subject if self.is_original else None, self.anatomy)
            if not self.is_known:
                return None
            plan = plan_chosen(self.anatomy, choice, spec)
            if plan.changes_nothing:
                raise NothingToDo(f"{spec.keep_experts} keeps all {self.anatomy.experts} experts; remove the step")
            return plan
        self._choice(spec)
        if spec.virtual:
            refuse_without_bias(self.anatomy)
            if spec.heal and spec.heal.merge:
                raise UsageError("merging folds experts that are removed, and virtual ones stay; leave merge out")
            return None
        count: int | None
        if spec.is_staged:
            counts = counts_of(self.anatomy, spec)
            self._refuse_all(min(counts))
            count = None if spec.search or spec.gates else min(counts)  # a stage may be rolled back
        else:
            count = count_to_keep(self.anatomy.experts, keep=spec.keep, ratio=spec.ratio, below=spec.below)
        if count is None:
            self.is_known = False
            return None
        check_count(self.anatomy, count)
        self._refuse_all(count)
        return plan_prune(self.anatomy, _any(self.anatomy, count))

    def _refuse_all(self, count: int) -> None:
        if count == self.anatomy.experts and self.is_known:
            raise NothingToDo(f"the checkpoint has {count} experts by then, so all would stay; keep fewer")

    def _choice(self, spec: PruneSpec) -> None:
        """Raise what choosing would raise, by the profile that there is or as far as it is known of one to come."""
        recipe, length = self.recipe, window_length(self.subject, self.recipe.text)
        if spec.profile is not None:
            profile = profile_of(spec.profile, self.subject if self.is_original else None, self.anatomy)
            check_choice_by(spec, profile, self.anatomy)
        elif self.taken is not None:
            check_choice_on(spec, [each.domain for each in trace_specs(recipe.text.calibrating)], length)
            if spec.is_staged and spec.criterion == "reconstruction" and self.taken.inner is None:
                raise UsageError("reconstruction follows from inner products: say profile: {inner: 4096} before prune")

    def _stages(self, spec: PruneSpec) -> None:
        heal = heal_of(spec)
        if not self.own:  # of samples there are no domains yet
            read_gate(self.subject, heal.judging, EvaluateSpec(gates=spec.gates), has_teacher=True)
            domains = [each.domain for each in trace_specs(heal.text)]
            if spec.stages is not None or spec.profile is None:  # later stages are profiled on what heals
                check_choice_on(spec, domains, window_length(self.subject, heal.text))
        if spec.run is None:
            return
        self._refuse_taken(spec.run, "run")
        for other in (self.output, self.subject.root):
            if overlap(spec.run, other):
                raise UsageError(f"run: {spec.run} and {other} overlap; name a folder of its own")
        refuse_place(spec.run, "run:")

    def _recover(self, step: RecoverStep) -> None:
        spec, text = recovery_of(self.recipe, step)
        check_training(self.anatomy, spec, text)
        if self.is_original and spec.losses.from_teacher:
            raise UsageError(
                "the checkpoint is its own teacher here, so there is nothing to learn; put retop or prune before it"
            )
        refuse_adapter(step.save_adapter, step.adapt, Writing(output=self.output), (self.subject.root,))
        if step.log is not None and step.log.exists():
            raise UsageError(f"recover: {{log: {step.log}}} exists; remove it or name another")
        for name, path in (("log", step.log), ("save_adapter", step.save_adapter)):
            self._refuse_taken(path, name)
        for name, folder in (("cache", step.cache), ("tensorboard", step.tensorboard)):
            if folder is not None:
                refuse_place(folder, f"{name}:")

    def _refuse_taken(self, path: Path | None, name: str) -> None:
        if path is None:
            return
        if path.absolute() in self.written:
            raise UsageError(f"{name}: {path} is written by a step before this one as well; name another")
        self.written.append(path.absolute())


def _any(anatomy: Anatomy, count: int) -> Kept:
    """Return ``count`` experts a layer: which ones is for the profile to say."""
    scores = np.zeros((len(anatomy.moe_layers), anatomy.experts))
    return best(scores, anatomy.moe_layers, count, anatomy.groups[0])
