"""Where a command takes a checkpoint, and which commands run one: exit codes and command lines to try."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import TEXT

MIXTRAL, DEEPSEEK = "builtin:tiny-mixtral", "builtin:tiny-deepseek"
USAGE, INPUT, OUTPUT = 2, 3, 5


def recipe_file(checkpoint: Path | str, folder: Path, steps: str = "[{retop: {}}]") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"checkpoint: {checkpoint}\nsteps: {steps}\n")
    return path


PLACES: dict[str, Callable[[Path, Path], list[str | Path]]] = {
    "retop": lambda bad, out: ["retop", bad, out],
    "profile": lambda bad, out: ["profile", bad, "-o", out, *TEXT],
    "prune": lambda bad, out: ["prune", bad, out, "--keep", "6", "--profile", "nowhere"],
    "recover": lambda bad, out: ["recover", bad, out, "--teacher", MIXTRAL, *TEXT],
    "recover-teacher": lambda bad, out: ["recover", MIXTRAL, out, "--teacher", bad, *TEXT],
    "evaluate": lambda bad, out: ["evaluate", bad, *TEXT],
    "evaluate-against": lambda bad, out: ["evaluate", MIXTRAL, "--against", bad, *TEXT],
    "run": lambda bad, out: ["run", recipe_file(bad, out.parents[1]), "-o", out],
}

RUNNING: dict[str, Callable[[Path], list[str | Path]]] = {
    "profile": lambda out: ["profile", MIXTRAL, "-o", out],
    "evaluate": lambda out: ["evaluate", MIXTRAL],
    "recover": lambda out: ["recover", MIXTRAL, out, "--teacher", DEEPSEEK],
}
running = pytest.mark.parametrize("command", RUNNING)
