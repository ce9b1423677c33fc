"""What of a run is done already: a run that was stopped goes on after the last step that its journal names.

``run.json`` says what a run was begun with. Only the same recipe, checkpoint, files and version go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import moesurgeon
from moesurgeon.checkpoint.whole_file import write_whole
from moesurgeon.pipeline.journal import NAME as JOURNAL
from moesurgeon.pipeline.journal import entries
from moesurgeon.pipeline.recipe import Recipe
from moesurgeon.pipeline.subject import Subject
from moesurgeon.profiling.artefact import PROFILE
from moesurgeon.traces.files import files_of
from moesurgeon.traces.spec import parse_traces

NAME, FIGURES = "run.json", "figures.json"
_END = "end"


class Past:
    """The finished steps of a run, in the order of the recipe; none for a new one."""

    def __init__(self, done: Sequence[dict[str, Any]] = ()) -> None:
        self._done = list(done)

    def __len__(self) -> int:
        return len(self._done)

    def take(self, stage: str) -> dict[str, Any] | None:
        """Return what the journal says of the next step, which is called ``stage``; None if it was not finished."""
        if not self._done or self._done[0].get("stage") != stage:
            return None
        return self._done.pop(0)


def digest_of(recipe: Recipe, subject: Subject) -> str:
    """Return a hash of what a run's results follow from: recipe, checkpoint, version, the files that it names."""
    facts = [moesurgeon.__version__, recipe.model_dump_json(), subject.fingerprint, *_files(recipe)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def begin(folder: Path, recipe_path: Path, digest: str) -> None:
    """Write down what the run in ``folder`` is begun with."""
    facts = {"moesurgeon": moesurgeon.__version__, "recipe": str(recipe_path), "digest": digest}
    write_whole(folder / NAME, json.dumps(facts, indent=2) + "\n")


def past_of(folder: Path, digest: str) -> Past | None:
    """Return what is finished of the run in ``folder``; None unless it was begun with the same and did not end."""
    if not (folder / NAME).is_file() or (folder / FIGURES).exists():
        return None
    try:
        begun = json.loads((folder / NAME).read_text(encoding="utf-8"))
        done = entries(folder / JOURNAL)
    except (OSError, ValueError):
        return None
    if not isinstance(begun, dict) or begun.get("digest") != digest:
        return None
    # A step that found nothing is done again, as is the end: both take moments.
    return Past([entry for entry in done if entry.get("stage") != _END and "why" not in entry])


def _files(recipe: Recipe) -> Iterator[str]:
    """Yield which files the recipe names, with their sizes and times."""
    heals = [step.heal for step in recipe.steps if step.heal]
    traces = [*recipe.text.traces, *(recipe.text.calibration or ()), *(recipe.text.validation or ())]
    traces += [*(recipe.text.report or ()), *(trace for heal in heals for trace in (*heal.traces, *heal.validation))]
    specs = [spec for trace in dict.fromkeys(traces) for spec in parse_traces((trace,)) if spec.builtin is None]
    paths = [path for spec in specs for path in files_of(Path(spec.location))]
    for step in recipe.steps:
        named = step.retop or step.prune
        paths += [path for name in ("profile", "keep_experts") if (path := getattr(named, name, None)) is not None]
    for path in paths:
        facts = (path / PROFILE.known if path.is_dir() else path).stat()
        yield f"{path} {facts.st_size} {facts.st_mtime_ns}"
