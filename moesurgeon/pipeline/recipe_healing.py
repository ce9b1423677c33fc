"""On which documents the steps of a recipe will heal: no stage is measured on them, not even the original, so that
all stages are measured on one text."""

from __future__ import annotations

from collections.abc import Iterator

from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.prune_spec import HEALED
from moesurgeon.pipeline.recipe import Recipe
from moesurgeon.pipeline.recipe_steps import recovery_of, step_on
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.text import read_text, trace_specs, window_length
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.traces.document_hashes import Hashes, documents_of
from moesurgeon.traces.documents import Split


def healing_documents(recipe: Recipe, subject: Subject) -> Hashes:
    """Return the hashes of the documents that calibrate in a step; what ``sample`` will write is not among them."""
    found: set[str] = set()
    for text, schedule, own_split in _texts(recipe):
        if recipe.text.split is None and all(spec.builtin for spec in trace_specs(text)):
            continue  # their splits share no document
        corpus = read_text(subject, text, builtin_split="calibration", own_split=own_split)
        if schedule is not None:
            corpus = schedule.needed(corpus, window_length(subject, text))
        found |= documents_of(corpus)
    return frozenset(found)


def _texts(recipe: Recipe) -> Iterator[tuple[Text, Schedule | None, Split]]:
    """Yield what the steps read to calibrate, of a recovery with its length, and the split of a user's files."""
    for step in recipe.steps:
        if heal := step_on(recipe, step).heal:
            chooses = step.prune is not None and step.prune.criterion == HEALED
            if heal.method != "none" or heal.merge or chooses:
                yield heal.text, None, "all" if heal.validation else "train"
        if step.recover:
            spec, text = recovery_of(recipe, step.recover)
            yield text, step.recover.schedule, "all" if spec.validation else "train"
