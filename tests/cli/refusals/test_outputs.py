"""Outputs that cannot be written, or would replace what a command did not make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.broken import whole
from tests.cli.conftest import TEXT
from tests.cli.invoke import contents, refused
from tests.cli.refusals.places import MIXTRAL, OUTPUT, PLACES, USAGE, recipe_file

OUTPUTS: dict[str, Callable[[str | Path], list[str | Path]]] = {
    "retop": lambda out: ["retop", MIXTRAL, out],
    "prune": lambda out: ["prune", MIXTRAL, out, "--keep", "6", "--profile", "nowhere"],
    "profile": lambda out: ["profile", MIXTRAL, "-o", out, *TEXT],
    "recover": lambda out: ["recover", MIXTRAL, out, "--teacher", MIXTRAL, *TEXT],
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_output_folder_that_is_not_empty(command: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    refused(USAGE, *OUTPUTS[command](tmp_path), says=("is not empty", "--overwrite"))
    # What was not made by such a command is not replaced by one.
    refused(USAGE, *OUTPUTS[command](tmp_path), "--overwrite", says=("does not replace it", "choose another"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", OUTPUTS)
def test_output_that_is_a_file_or_below_one(command: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    refused(USAGE, *OUTPUTS[command](file), says=("not a folder", "choose another"))
    refused(USAGE, *OUTPUTS[command](file), "--overwrite", says=("not a folder", "choose another"))
    refused(USAGE, *OUTPUTS[command](file / "below"), says=("is a file", "choose another"))
    refused(OUTPUT, *OUTPUTS[command](tmp_path / ("x" * 300)), says=("too long", "choose another"))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("command", ["retop", "profile", "prune", "recover", "recover-teacher", "run"])
def test_output_in_or_around_the_source(command: str, overwrite: list[str], tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    before = contents(source)
    for place in (source, source / "inside", tmp_path):
        refused(USAGE, *_to(command, source, place, tmp_path), *overwrite, says=("overlap", "choose"))
    assert contents(source) == before


def _to(command: str, source: Path, place: Path, folder: Path) -> list[str | Path]:
    if command == "run":
        return ["run", recipe_file(source, folder), "-o", place]
    return [place if part == folder / "OUT" else part for part in PLACES[command](source, folder / "OUT")]


def test_run_folder_that_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    recipe = recipe_file(MIXTRAL, tmp_path)
    before = contents(tmp_path)
    for extra in ([], ["--overwrite"]):
        refused(USAGE, "run", recipe, "-o", tmp_path / "folder", *extra, says=("not the folder of a run", "choose"))
        refused(USAGE, "run", recipe, "-o", recipe, *extra, says=("not a folder", "choose"))
    assert contents(tmp_path) == before
