"""What of a recipe cannot be done, told from headers alone before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moesurgeon.checkpoint.staging import overlap, refuse_unusable
from moesurgeon.engine import device
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.evaluate import EvaluateSpec, needs_intervals, read_gate, refuse_unknown_intervals
from moesurgeon.pipeline.heal import check_heal
from moesurgeon.pipeline.options import HealSpec, Writing
from moesurgeon.pipeline.prune_spec import PruneSpec, refuse_without_healing
from moesurgeon.pipeline.recipe import Recipe, Step
from moesurgeon.pipeline.recover_adapter import refuse_adapter
from moesurgeon.pipeline.run_folder import RUN
from moesurgeon.pipeline.sample import refuse_unsampled
from moesurgeon.pipeline.stage_state import counts_of, heal_of
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.text import read_text, trace_specs, window_length
from moesurgeon.pipeline.tokenizers import refuse_other_tokenizer
from moesurgeon.recovery.adalora import refuse_ranks
from moesurgeon.recovery.log import check_log
from moesurgeon.recovery.objective import refuse_without_gradient
from moesurgeon.recovery.targets import check_adapt
from moesurgeon.selection.choose import best, count_to_keep
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.prune import Kept, check_count, plan_prune
from moesurgeon.surgery.retop import plan_retop
from moesurgeon.surgery.virtual import refuse_without_bias


def refuse_impossible(recipe: Recipe, output: Path) -> None:
    """Raise now, from headers alone, what a step would raise after the work of those before it."""
    subject = open_subject(recipe.checkpoint)
    refuse_unusable(output, RUN, overwrite=True, sources=(subject.root,))
    device.place(recipe.running.device, recipe.running.dtype, subject.stored_dtype)
    window_length(subject, recipe.text)
    trace_specs(recipe.text.calibrating)
    reported = recipe.text.reported(recipe.report_tokens)
    trace_specs(reported)
    if recipe.gate:
        read_gate(subject, reported, EvaluateSpec(gates=(recipe.gate,)), has_teacher=True)
    anatomy = subject.anatomy
    own: list[str] = []
    for step in recipe.steps:
        if step.sample:
            refuse_unsampled(subject, step.sample, recipe.running)
            own.append(step.sample.domain)
        if healing := step_on(recipe, step).heal:
            check_heal(healing)
            if healing.teacher is not None and not overlap(Path(healing.teacher), output):  # a stage is not there yet
                refuse_other_tokenizer(subject, open_subject(healing.teacher))
            _refuse_taken(own, healing)
            if step.retop and healing.merge:
                raise UsageError("heal: {merge: true} is for prune: retop drops no experts that could be folded")
        if step.prune:
            refuse_without_healing(step.prune.criterion, step.prune.heal)
        if step.retop:
            anatomy = plan_retop(anatomy, step.retop.spec).result(anatomy)
        elif step.prune:
            anatomy = _pruned(anatomy, step.prune)
        elif step.recover:
            check_adapt(step.recover.adapt, step.recover.adapter)
            if step.recover.adapter == "adalora":
                refuse_ranks(anatomy, step.recover.schedule.rank, step.recover.schedule.steps)
            check_log(step.recover.log, step.recover.tensorboard)
            refuse_adapter(step.recover.save_adapter, step.recover.adapt, Writing(output=output), (subject.root,))
            if step.recover.log is not None and step.recover.log.exists():
                raise UsageError(f"recover: {{log: {step.recover.log}}} exists; remove it or name another")
            refuse_without_gradient(anatomy, step.recover.losses, step.recover.adapt)
    _refuse_unknown_intervals(subject, recipe)


def _refuse_unknown_intervals(subject: Subject, recipe: Recipe) -> None:
    """Raise UsageError if a gate needs an interval and its text, which is read for that, is one document."""
    text = recipe.text.reported(recipe.report_tokens)
    gate = read_gate(subject, text, EvaluateSpec(gates=(recipe.gate,) if recipe.gate else ()), has_teacher=True)
    if needs_intervals(gate):
        refuse_unknown_intervals(gate, read_text(subject, text, builtin_split="report"), has_teacher=True)
    is_sampled = False
    for step in recipe.steps:
        is_sampled = is_sampled or step.sample is not None
        heal = step_on(recipe, step).heal
        if step.prune and step.prune.gates and heal is not None and not is_sampled:  # samples are not there yet
            gate = read_gate(subject, heal.judging, EvaluateSpec(gates=step.prune.gates), has_teacher=True)
            if needs_intervals(gate):
                corpus = read_text(subject, heal.judging, builtin_split="validation")
                refuse_unknown_intervals(gate, corpus, has_teacher=True)


def _refuse_taken(own: Sequence[str], healing: HealSpec) -> None:
    """Raise UsageError if a trace has the name of a sample, ``own``, that is healed on beside it."""
    for spec in trace_specs(healing.text):
        if spec.domain in own:
            raise UsageError(f"{spec.domain} is what sample writes: give the trace {spec.location} another name")


def _pruned(anatomy: Anatomy, asked: PruneSpec) -> Anatomy:
    """Return what pruning makes of ``anatomy``, as far as that can be known; UsageError for what cannot be asked."""
    if asked.virtual:
        refuse_without_bias(anatomy)
    if asked.is_staged:
        heal_of(asked)
    if asked.keep_experts is not None:
        return anatomy
    count: int | None
    if asked.is_staged:
        counts = counts_of(anatomy, asked)
        count = None if asked.search else min(counts)
    elif asked.virtual:
        return anatomy
    else:
        count = count_to_keep(anatomy.experts, keep=asked.keep, ratio=asked.ratio, below=asked.below)
    if count is None:  # how many go is for the profile or the gate to say
        return anatomy
    check_count(anatomy, count)
    return plan_prune(anatomy, _any(anatomy, count)).result(anatomy)


def _any(anatomy: Anatomy, count: int) -> Kept:
    """Return ``count`` experts a layer: which ones is for the profile to say."""
    scores = np.zeros((len(anatomy.moe_layers), anatomy.experts))
    return best(scores, anatomy.moe_layers, count, anatomy.groups[0])


def step_on(recipe: Recipe, step: Step, own: Sequence[str] = ()) -> Step:
    """Return ``step`` with the recipe's text and first checkpoint (as teacher) for its healing, where it names none;
    ``own``: traces that were sampled, to heal on as well."""
    if step.heal is None:
        return step
    heal = replace(
        step.heal,
        traces=(*(step.heal.traces or recipe.text.calibrating.traces), *own),
        validation=step.heal.validation or recipe.text.validation or (),
        length=step.heal.length or recipe.text.length,
        teacher=step.heal.teacher or recipe.checkpoint,
    )
    if step.retop:
        return step.model_copy(update={"retop": step.retop.model_copy(update={"heal": heal})})
    assert step.prune is not None
    return step.model_copy(update={"prune": replace(step.prune, heal=heal)})
