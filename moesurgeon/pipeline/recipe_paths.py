"""Relative paths of a recipe are relative to its folder, so that it means the same wherever it is run from.

What is there only relative to the working directory is refused: read from another place, a recipe would silently read
other files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from moesurgeon.errors import InputError
from moesurgeon.pipeline.options import HealSpec, Text
from moesurgeon.pipeline.recipe import Recipe, Step
from moesurgeon.pipeline.recipe_text import Place, RecipeText

_NOT_PATHS = ("builtin:", "hf://")
_TEXTS = ("traces", "calibration", "validation", "report")
_Texts = TypeVar("_Texts", Text, HealSpec)


def located(recipe: Recipe, text: RecipeText) -> Recipe:
    """Return ``recipe`` with paths that lead to the same place from anywhere; InputError as the module says."""
    base = text.path.absolute().parent

    def path(given: Path | None, *place: str | int) -> Path | None:
        return None if given is None else Path(_path(str(given), base, text, place))

    def texts(given: _Texts, *place: str | int) -> _Texts:
        # Not all of these have all of them.
        named: Iterator[tuple[str, Any]] = ((name, getattr(given, name, None)) for name in _TEXTS)
        found: dict[str, Any] = {name: _traces(each, base, text, (*place, name)) for name, each in named if each}
        return replace(given, **found)

    def heal(given: HealSpec | None, *place: str | int) -> HealSpec | None:
        if given is None:
            return None
        teacher = None if given.teacher is None else _path(given.teacher, base, text, (*place, "teacher"))
        return replace(texts(given, *place), teacher=teacher)

    return recipe.model_copy(
        update={
            "checkpoint": _path(recipe.checkpoint, base, text, ("checkpoint",)),
            "text": texts(recipe.text, "text"),
            "steps": tuple(_step(step, path, heal, ("steps", number)) for number, step in enumerate(recipe.steps)),
        }
    )


def _step(
    step: Step, path: Callable[..., Path | None], heal: Callable[..., HealSpec | None], place: tuple[str | int, ...]
) -> Step:
    if step.retop:
        here = (*place, "retop")
        found = {
            "profile": path(step.retop.profile, *here, "profile"),
            "heal": heal(step.retop.heal, *here, "heal"),
        }
        return step.model_copy(update={"retop": step.retop.model_copy(update=found)})
    if step.prune:
        here = (*place, "prune")
        names: tuple[str, ...] = ("profile", "keep_experts", "curve_plot", "run")
        files: dict[str, Any] = {name: path(getattr(step.prune, name), *here, name) for name in names}
        pruned = replace(step.prune, heal=heal(step.prune.heal, *here, "heal"), **files)
        return step.model_copy(update={"prune": pruned})
    if step.recover:
        here = (*place, "recover")
        names = ("cache", "log", "tensorboard", "save_adapter")
        files = {name: path(getattr(step.recover, name), *here, name) for name in names}
        return step.model_copy(update={"recover": step.recover.model_copy(update=files)})
    return step


def _traces(given: tuple[str, ...], base: Path, text: RecipeText, place: Place) -> tuple[str, ...]:
    """Return traces ``[NAME=]PATH[:COLUMN]``, or ``builtin:NAME``, with paths from anywhere."""
    return tuple(_trace(trace, base, text, (*place, number)) for number, trace in enumerate(given))


def _trace(trace: str, base: Path, text: RecipeText, place: Place) -> str:
    name, equals, rest = trace.partition("=")
    if trace.startswith(_NOT_PATHS) or (equals and rest.startswith(_NOT_PATHS)):
        return trace
    # The longest reading that exists wins, as on the command line.
    for before, location in (("", trace), (name + equals, rest)) if equals else (("", trace),):
        if _is_there(_from(base, location)):
            return before + str(_from(base, location))
        if not _is_fixed(location) and _is_there(Path(location)):
            raise _elsewhere(location, base, text, place)
    return (name + equals if equals else "") + str(_from(base, rest if equals else trace))


def _path(given: str, base: Path, text: RecipeText, place: Place) -> str:
    if given.startswith(_NOT_PATHS):
        return given
    path = _from(base, given)
    if not _exists(path) and not _is_fixed(given) and _exists(Path(given)):
        raise _elsewhere(given, base, text, place)
    return str(path)


def _elsewhere(given: str, base: Path, text: RecipeText, place: Place) -> InputError:
    where = ".".join(map(str, place))
    return InputError(
        f"{text.at(place)}: {where}: {given} is in the working directory, and not in {base}; relative paths are "
        "relative to the recipe: give the path from there, or the whole one"
    )


def _from(base: Path, given: str) -> Path:
    try:
        return base / Path(given).expanduser()
    except RuntimeError:  # no such user: what the path leads to is not there, and said so by whoever reads it
        return base / given


def _is_fixed(given: str) -> bool:
    return given.startswith(("~", "/"))


def _is_there(path: Path) -> bool:
    """Whether a trace can be read from ``path``, or from what is before its last colon."""
    before, colon, _column = str(path).rpartition(":")
    return _exists(path) or (colon == ":" and _exists(Path(before)))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a null character
        return False
