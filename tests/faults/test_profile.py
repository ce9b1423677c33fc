"""A profile that is killed goes on from its last layer and ends in the same bytes; nothing else is left behind."""

from __future__ import annotations

import errno
import json
import os
import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.engine import state
from moesurgeon.engine.hidden import HiddenStates
from moesurgeon.engine.state import WalkState
from moesurgeon.engine.walk import Layer, Walk
from moesurgeon.errors import OutputError
from moesurgeon.pipeline import walking
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.profile import ProfileOutput, profile
from tests.engine.tight import plenty, tight
from tests.faults.forked import ended, forked, kill_at, killed

CHECKPOINT = "builtin:tiny-mixtral"
TEXT = Text(traces=("builtin:arithmetic", "builtin:json"), max_tokens=640, length=64)
RUNNING = Running(device="cpu", dtype="float32")
BATCHES, LAYERS = 2, 4


def _take(out: Path, checkpoint: str = CHECKPOINT, text: Text = TEXT, **options: Any) -> bytes:
    profile(checkpoint, ProfileOutput(output=out, **options), text, RUNNING)
    return (out / "stats.safetensors").read_bytes()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The statistics of an undisturbed run with everything in memory."""
    return _take(tmp_path_factory.mktemp("clean") / "profile")


@pytest.fixture(autouse=True)
def _streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers fit into memory, and no hidden states."""

    monkeypatch.setattr(walking, "share_out", tight)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After how many layers each run in this process went on."""
    seen: list[int] = []
    resumed = WalkState.resumed

    def noted(self: WalkState, walk: Walk, *rest: Any) -> int:
        seen.append(resumed(self, walk, *rest))
        return seen[-1]

    monkeypatch.setattr(WalkState, "resumed", noted)
    return seen


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _dies(out: Path, target: object, name: str, call: int, **options: Any) -> int:
    """Profile in a process that dies after the given call of ``target.name``; return how it ended."""

    def work() -> None:
        kill_at(target, name, call)()
        _take(out, **options)

    return ended(forked(work))


def test_streamed_and_on_disk_it_is_the_same(clean: bytes, tmp_path: Path) -> None:
    assert _take(tmp_path / "profile") == clean
    assert _names(tmp_path) == ["profile"]


# Of every layer: its first batch, its last, each of the writes that keep it.
MOMENTS = [
    *((HiddenStates, "put", call) for call in (1, 3, 4, 5, 8, 10)),
    *((state, "sync", call) for call in (1, 3, 4, 6, 12)),
    *((Path, "rename", call) for call in (1, 2, 4, 8)),
]


@pytest.mark.parametrize(("target", "name", "call"), MOMENTS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_killed_at_any_moment_it_goes_on(
    target: object, name: str, call: int, clean: bytes, tmp_path: Path, starts: list[int]
) -> None:
    assert _dies(tmp_path / "profile", target, name, call) == -9
    assert _names(tmp_path) == [".profile.walk"]
    assert _take(tmp_path / "profile") == clean
    assert _names(tmp_path) == ["profile"]
    if target is HiddenStates:
        assert starts == [max(0, (call - 1) // BATCHES - 1)]


def test_killed_again_and_again_it_gets_there(clean: bytes, tmp_path: Path) -> None:
    """At random moments, on top of what the ones before it left."""
    rng = random.Random(11)
    out = tmp_path / "profile"
    began = time.monotonic()
    assert _take(out) == clean
    seconds = time.monotonic() - began
    for _ in range(6):
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
        for _attempt in range(3):
            if not out.exists():
                assert killed(forked(partial(_take, out)), rng.uniform(0, seconds)) in (-9, 0)
        if not out.exists():
            assert _take(out) == clean
        assert (out / "stats.safetensors").read_bytes() == clean
        # One that is killed while it writes or tidies up leaves what the next one at this place takes away.
        assert all(name == "profile" or name.startswith(".profile.") for name in _names(tmp_path))
    _take(out, overwrite=True)
    assert _names(tmp_path) == ["profile"]


@pytest.mark.parametrize("call", [1, 3, BATCHES * 2, BATCHES * LAYERS])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError], ids=lambda error: error.__name__)
def test_an_error_in_a_layer_is_no_end_either(
    error: type[BaseException], call: int, clean: bytes, tmp_path: Path, starts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls, move = [0], Layer.move

    def failing(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise error
        move(*arguments)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(Layer, "move", failing)
        _take(tmp_path / "profile")
    assert _names(tmp_path) == [".profile.walk"]
    assert _take(tmp_path / "profile") == clean
    assert starts == [0, (call - 1) // BATCHES]
    assert _names(tmp_path) == ["profile"]


@pytest.mark.parametrize(
    "other",
    [
        {"text": replace(TEXT, traces=("builtin:arithmetic", "builtin:logs"))},
        {"text": replace(TEXT, max_tokens=600)},
        {"text": replace(TEXT, length=32)},
        {"text": replace(TEXT, split="report")},
        {"checkpoint": "builtin:tiny-deepseek"},
    ],
    ids=str,
)
def test_the_state_of_another_profile_is_not_gone_on_from(
    other: dict[str, Any], tmp_path: Path, starts: list[int]
) -> None:
    expected = _take(tmp_path / "expected", **other)
    assert _dies(tmp_path / "profile", HiddenStates, "put", BATCHES * 3 + 1) == -9
    assert _take(tmp_path / "profile", **other) == expected
    assert starts == [0, 0]
    assert _names(tmp_path) == ["expected", "profile"]


@pytest.mark.parametrize("damage", ["state.json", "sums", "nonsense", "wrong done"])
def test_a_damaged_state_is_started_over(damage: str, clean: bytes, tmp_path: Path, starts: list[int]) -> None:
    assert _dies(tmp_path / "profile", HiddenStates, "put", BATCHES * 4) == -9
    (folder,) = (tmp_path / ".profile.walk").iterdir()
    facts = folder / "state.json"
    match damage:
        case "state.json":
            facts.unlink()
        case "sums":
            for path in folder.glob("*.safetensors"):
                path.unlink()
        case "nonsense":
            facts.write_bytes(b"\xff{")
        case "wrong done":
            facts.write_text(json.dumps({**json.loads(facts.read_text()), "done": "two"}))
    assert _take(tmp_path / "profile") == clean
    assert starts == [0]
    assert _names(tmp_path) == ["profile"]


def test_without_resume_nothing_is_left(
    clean: bytes, tmp_path: Path, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "here").mkdir()
    assert _dies(tmp_path / "here" / "profile", HiddenStates, "put", BATCHES * 3 + 1, resume=False) == -9
    assert _names(tmp_path / "here") == []
    before = _names(tmp_path / "tmp")  # nobody tidies up after a kill
    assert _take(tmp_path / "here" / "profile", resume=False) == clean
    assert starts == []
    assert _names(tmp_path / "here") == ["profile"]
    assert _names(tmp_path / "tmp") == before


def test_a_state_goes_when_the_next_attempt_needs_none(
    clean: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one had too little memory, the second has enough."""
    assert _dies(tmp_path / "profile", HiddenStates, "put", BATCHES * 3 + 1) == -9
    monkeypatch.setattr(walking, "share_out", plenty)
    assert _take(tmp_path / "profile") == clean
    assert _names(tmp_path) == ["profile"]


def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"No space left.*choose another disk"):
        patch.setattr(os, "posix_fallocate", full)
        _take(tmp_path / "profile")
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"No space left.*or use --no-resume"):
        patch.setattr(state, "sync", full)
        _take(tmp_path / "profile")
    assert not (tmp_path / "profile").exists()
