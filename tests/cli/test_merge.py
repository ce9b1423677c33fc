"""``prune --merge``: what is printed, planned and refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.invoke import contents, refused, succeeded

MIXTRAL = "builtin:tiny-mixtral"
HEAL = ("--heal", "builtin:json", "--heal-tokens", "1024", "--heal-heldout", "1024", "--heal-method", "scale")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "kept.json"
    path.write_text(str({str(layer): [0, 1, 2, 3, 4, 5] for layer in range(4)}).replace("'", '"'))
    return path


def test_with_a_choice_of_ones_own(out: Path, kept: Path) -> None:
    arguments = ("prune", MIXTRAL, out, "--keep-experts", kept, "--merge")
    assert "by scale, up to 1,024 tokens, merging first" in succeeded(*arguments, *HEAL, "--dry-run").out
    shown = succeeded(*arguments, *HEAL).out
    assert len(re.findall(r"\(merge 0\.\d{4}( \(left\))?, scale 0\.\d{4}", shown)) == 4, shown
    assert re.search(r"merging was (kept|left out|not better)", shown)


def test_only_merged(out: Path, profiles: dict[str, Path]) -> None:
    arguments = ("prune", MIXTRAL, out, "--profile", profiles[MIXTRAL], "--keep", "6", "--merge", *HEAL[:-1], "none")
    report = succeeded(*arguments, "--json").json
    into = {str(layer["layer"]): [*map(int, layer["steps"][0]["into"])] for layer in report["healing"]}
    assert into == report["dropped"] and isinstance(report["healed"]["merge"], bool)
    assert [[step["step"] for step in layer["steps"]] for layer in report["healing"]] == [["merge"]] * 4
    assert report["healed"]["kept"] == (report["healed"]["heldout"]["healed"] < report["healed"]["heldout"]["bare"])


def test_without_text_it_is_refused(out: Path, kept: Path) -> None:
    refused(2, "prune", MIXTRAL, out, "--keep-experts", kept, "--merge", says=("--merge", "add --heal"))
    assert contents(out.parent).keys() == {"kept.json"}
