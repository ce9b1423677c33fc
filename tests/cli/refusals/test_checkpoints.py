"""Checkpoints that cannot be used, for every command and every place that takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.broken import CONTRADICTORY, UNREADABLE, whole
from tests.cli.invoke import moesurgeon, refused, succeeded
from tests.cli.refusals.places import DEEPSEEK, INPUT, MIXTRAL, OUTPUT, PLACES, USAGE


@pytest.mark.parametrize("place", [*PLACES, "inspect", "verify"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_checkpoint(kind: str, place: str, broken: Callable[[str], Path], out: Path) -> None:
    command = PLACES.get(place, lambda bad, out: [place, bad])
    refused(INPUT, *command(broken(kind), out), says=UNREADABLE[kind][1:])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", CONTRADICTORY)
def test_contradictory_checkpoint(kind: str, place: str, broken: Callable[[str], Path], out: Path) -> None:
    message = outcome_of_contradiction(INPUT, PLACES[place](broken(kind), out))
    assert CONTRADICTORY[kind][1] in message


@pytest.mark.parametrize("kind", CONTRADICTORY)
def test_contradictory_checkpoint_is_described_and_does_not_verify(kind: str, broken: Callable[[str], Path]) -> None:
    assert CONTRADICTORY[kind][1] in " ".join(succeeded("inspect", broken(kind), "--json").json["problems"])
    assert "does not verify" in outcome_of_contradiction(OUTPUT, ["verify", broken(kind)])


def outcome_of_contradiction(code: int, command: list[str | Path]) -> str:
    """What is wrong is all that can be said here: which of the two is right, only the user knows."""
    outcome = moesurgeon(*command)
    assert outcome.code == code and outcome.out == "" and len(outcome.err.splitlines()) == 1, outcome.err
    return outcome.err


def test_verify_source(broken: Callable[[str], Path], top1: dict[str, Path]) -> None:
    result = top1[MIXTRAL]
    refused(INPUT, "verify", result, "--source", broken("truncated"), says=("truncated", "download"))
    refused(INPUT, "verify", result, "--source", DEEPSEEK, says=("was not made from", "fingerprints"))
    refused(INPUT, "verify", MIXTRAL, "--source", MIXTRAL, says=("no moesurgeon.json", "no record"))


def test_checkpoint_that_was_changed_after_its_surgery(tmp_path: Path, top1: dict[str, Path]) -> None:
    """One bit of one tensor, behind the back of the fingerprint's samples."""
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in top1[MIXTRAL].iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    shard = sorted(changed.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    succeeded("verify", changed)
    refused(OUTPUT, "verify", changed, "--source", MIXTRAL, says=("does not verify", "differs from"))


@pytest.mark.parametrize("content", ["{", "[]", '{"history": 5}', '{"history": [5]}'])
def test_damaged_record(content: str, tmp_path: Path) -> None:
    damaged = whole(tmp_path / "damaged")
    (damaged / "moesurgeon.json").write_text(content)
    refused(INPUT, "verify", damaged, says=("moesurgeon.json",))


@pytest.mark.parametrize("command", ["inspect", "retop", "prune", "profile", "recover", "evaluate", "verify"])
def test_unknown_builtin(command: str, out: Path) -> None:
    places = {"inspect": lambda bad, out: ["inspect", bad], "verify": lambda bad, out: ["verify", bad], **PLACES}
    refused(USAGE, *places[command]("builtin:huge-mixtral", out), says=("'huge-mixtral'", "tiny-mixtral"))


def test_hub_names() -> None:
    refused(USAGE, "inspect", "hf://a/b/c/d", says=("hf://a/b/c/d", "hf://org/name"))


def test_path_that_no_file_system_takes() -> None:
    refused(INPUT, "inspect", "x" * 5000, says=("name too long",))


@pytest.mark.parametrize("command", ["retop", "prune", "recover"])
def test_a_record_of_another_checkpoint(command: str, out: Path, tmp_path: Path) -> None:
    """Its edit could never verify; what to do is said before any work."""
    source = whole(tmp_path / "source")
    succeeded("retop", MIXTRAL, tmp_path / "top1", "--json")
    record = tmp_path / "top1" / "moesurgeon.json"
    (source / record.name).write_bytes(record.read_bytes())
    arguments = {
        "retop": ("retop", source, out),
        "prune": ("prune", source, out, "--profile", tmp_path, "--keep", "6"),
        "recover": ("recover", source, out, "--teacher", MIXTRAL, "-t", "builtin:json"),
    }
    says = ("is not what its moesurgeon.json records", "remove moesurgeon.json if the change is meant")
    refused(INPUT, *arguments[command], says=says)
    assert not out.exists()
