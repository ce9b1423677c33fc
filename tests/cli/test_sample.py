"""``sample``: text drawn from a checkpoint, written whole, read again as a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesurgeon.engine import budget
from moesurgeon.pipeline.sample import uniform
from tests.cli.invoke import moesurgeon, one_line, refused, succeeded
from tests.conftest import BUILTIN

FEW = ("--max-tokens", "96", "--length", "24", "--rows", "2")
SMALL = (*FEW, "--device", "cpu")
USAGE = 2


@pytest.mark.parametrize("name", BUILTIN)
def test_a_sample_is_a_trace(name: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    report = succeeded("sample", name, "-o", file, *SMALL, "--json").json
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert report["tokens"] == 96 and report["texts"] == len(texts) >= 4 and not report["uniform"]
    assert all(text.strip() for text in texts) and report["distinct"] == len(set(texts)) > 1
    read = succeeded("evaluate", name, "-t", f"own={file}", "--split", "all", "--device", "cpu", "--json").json
    assert read["domains"]["own"]["documents"] == len(texts)
    # What a model says itself surprises it little: it was told 2,048 and more tokens apart.
    noise = tmp_path / "noise.jsonl"
    assert "texts" in succeeded("sample", name, "-o", noise, *FEW, "--uniform").out
    apart = succeeded("evaluate", name, "-t", f"noise={noise}", "--split", "all", "--device", "cpu", "--json").json
    assert apart["loss"] > read["loss"] + 2


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    one, other, third = (tmp_path / f"{number}.jsonl" for number in range(3))
    for file, seed in ((one, "3"), (other, "3"), (third, "4")):
        assert f"wrote {file}" in succeeded("sample", BUILTIN[0], "-o", file, *SMALL, "--seed", seed).out
    assert one.read_bytes() == other.read_bytes() != third.read_bytes()


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    refused(USAGE, "sample", BUILTIN[0], "-o", tmp_path / "own.txt", *SMALL, says=("name it something.jsonl",))
    refused(USAGE, "sample", BUILTIN[0], "-o", tmp_path / "a" / "own.jsonl", "--length", "100000", says=("context",))
    refused(USAGE, "sample", BUILTIN[0], "-o", file, "--length", "100000", says=("context", "give at most"))
    refused(
        USAGE, "sample", BUILTIN[0], "-o", file, *SMALL, "--max-memory", "1MB", says=("--max-memory", "give at least")
    )
    assert not list(tmp_path.iterdir())
    file.write_text("mine")
    refused(USAGE, "sample", BUILTIN[0], "-o", file, *SMALL, says=("exists", "--overwrite"))
    assert file.read_text() == "mine"
    succeeded("sample", BUILTIN[0], "-o", file, *FEW, "--uniform", "--overwrite")
    assert file.read_text() != "mine" and [each.name for each in tmp_path.iterdir()] == ["own.jsonl"]


def test_folders_are_made(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "own.jsonl"
    succeeded("sample", BUILTIN[0], "-o", file, *FEW, "--uniform")
    assert [path.name for path in file.parent.iterdir()] == ["own.jsonl"]


def test_two_at_once_and_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two is refused while the first draws, and a file that came up meanwhile is not replaced."""
    file = tmp_path / "own.jsonl"
    real, outcomes = uniform, []

    def meanwhile(*arguments: object) -> object:
        if not outcomes:
            outcomes.append("begun")
            outcomes.append(refused(5, *command, says=("another moesurgeon is writing", "own.jsonl")))
            file.write_text("mine")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("moesurgeon.pipeline.sample.uniform", meanwhile)
    command = ("sample", BUILTIN[0], "-o", file, *FEW, "--uniform")
    one_line(moesurgeon(*command), USAGE, "came up meanwhile", "--overwrite")
    assert file.read_text() == "mine" and len(outcomes) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["own.jsonl"]


def test_a_checkpoint_beyond_memory_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "taken_bytes", lambda *_given: 0)
    refused(
        USAGE, "sample", BUILTIN[1], "-o", tmp_path / "own.jsonl", *SMALL, "--max-memory", "9MB",
        says=("sample without --uniform needs the checkpoint in memory", "--max-memory is 9MB: give at least"),
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
    succeeded("sample", BUILTIN[1], "-o", tmp_path / "own.jsonl", *FEW, "--uniform")
