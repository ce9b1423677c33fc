"""What the steps of a recipe are given: its text and its first checkpoint, where they name no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.recipe import Recipe, RecoverStep, Step
from moesurgeon.pipeline.recover import RecoverSpec


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


def recovery_of(recipe: Recipe, step: RecoverStep) -> tuple[RecoverSpec, Text]:
    """Return what ``recover`` is asked for by ``step``, and on which text."""
    given = set(RecoverStep.model_fields) & {field.name for field in fields(RecoverSpec)}
    spec = RecoverSpec(
        teacher=recipe.checkpoint,
        validation=recipe.text.validation or (),
        **{name: getattr(step, name) for name in given},
    )
    return spec, replace(recipe.text.calibrating, max_tokens=step.max_tokens)


def usage_text(recipe: Recipe, max_tokens: int | None) -> Text:
    """Return the recipe's text to measure the utilisation of experts on, evenly of all domains."""
    return replace(recipe.text.profiled(max_tokens), budgets={}, weights={})
