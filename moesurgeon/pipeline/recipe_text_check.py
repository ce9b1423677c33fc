"""Whether the text of a recipe is enough for all that its steps read of it, told before the first one.

Of a user's text a few tokens of every split that will be asked for are read, as the steps read them; of builtin text
it is known that every split has some. Where validation has files of its own, all is read, so that no document is on
both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moesurgeon.errors import UsageError
from moesurgeon.pipeline.evaluate import EvaluateSpec, needs_intervals, read_gate, refuse_unknown_intervals
from moesurgeon.pipeline.healing_text import judging_text, read_healing_text
from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.recipe import Recipe
from moesurgeon.pipeline.recipe_steps import recovery_of, step_on, usage_text
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.text import read_text
from moesurgeon.traces.budgets import SHORTEST, shares_of
from moesurgeon.traces.documents import Split
from moesurgeon.traces.spec import parse_traces


def refuse_unusable_text(recipe: Recipe, subject: Subject) -> None:
    """Raise UsageError or TraceError for text that is too little, or that would judge what was made with it."""
    if (
        recipe.text.split is not None
        and not recipe.text.report
        and any(step.heal or step.recover for step in recipe.steps)
    ):
        raise UsageError(
            f"split: {recipe.text.split} is what every step would read, so that the text that heals or trains is also "
            "what the result is measured on; leave split out, and every step reads its own"
        )
    read: set[str] = set()
    for text, builtin_split, own_split, sampled in _texts(recipe):
        domains = [*(spec.domain for spec in parse_traces(text.traces)), *sampled]
        shares_of(domains, text.max_tokens, text.budgets)
        little = _little(text)
        if little.traces and (name := f"{little} {builtin_split} {own_split}") not in read:
            read_text(subject, little, builtin_split=builtin_split, own_split=own_split)
            read.add(name)
    if recipe.text.validation:
        for text, judging in {str(pair): pair for pair in _pairs(recipe)}.values():
            read_healing_text(subject, text, judging, is_given=True)  # refuses what would be on both sides
    _refuse_unknown_intervals(recipe, subject)


def _pairs(recipe: Recipe) -> Iterator[tuple[Text, Text]]:
    """Yield the text that heals or trains with the text that judges it, of every step."""
    for step in recipe.steps:
        if heal := step_on(recipe, step).heal:
            yield heal.text, heal.judging
        if step.recover:
            spec, text = recovery_of(recipe, step.recover)
            yield text, judging_text(text, spec.validation, spec.heldout_tokens)


def _texts(recipe: Recipe) -> Iterator[tuple[Text, Split, Split, Sequence[str]]]:
    """Yield all that is read: text, split of builtin and of own traces, and the domains that are sampled by then."""
    yield recipe.text.reported(recipe.report_tokens), "report", "all", ()
    yield usage_text(recipe, None), "calibration", "all", ()  # of every state
    sampled: list[str] = []
    for step in recipe.steps:
        if step.sample:
            sampled.append(step.sample.domain)
        if step.profile:
            yield recipe.text.profiled(step.profile.max_tokens), "calibration", "all", ()
        if heal := step_on(recipe, step).heal:
            yield heal.text, "calibration", "all" if heal.validation else "train", tuple(sampled)
            yield heal.judging, "validation", "all", () if heal.validation else tuple(sampled)
        if step.recover:
            spec, text = recovery_of(recipe, step.recover)
            yield text, "calibration", "all" if spec.validation else "train", ()
            yield judging_text(text, spec.validation, spec.heldout_tokens), "validation", "all", ()


def _little(text: Text) -> Text:
    """Return the user's own traces of ``text``, and as few tokens of each as are text at all."""
    own = tuple(trace for trace in text.traces if all(spec.builtin is None for spec in parse_traces([trace])))
    return replace(text, traces=own, max_tokens=SHORTEST * len(own), budgets={}, weights={}, sample=None)


def _refuse_unknown_intervals(recipe: Recipe, subject: Subject) -> None:
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
