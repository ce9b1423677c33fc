"""Inner products and latency over kills, memory that is short, several processes and a full disk."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.engine import state
from moesurgeon.engine.hidden import HiddenStates
from moesurgeon.engine.state import WalkState
from moesurgeon.engine.walk import Walk
from moesurgeon.errors import OutputError
from moesurgeon.pipeline import walking
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.profiling import all_experts
from moesurgeon.profiling.all_experts import AllExperts
from moesurgeon.profiling.artefact import load_profile
from moesurgeon.profiling.inner import InnerWriter
from tests.engine.tight import tight
from tests.faults.forked import ended, forked, kill_at

CHECKPOINT = "builtin:tiny-deepseek"
TRACES = ("builtin:arithmetic", "builtin:json")
TEXT = Text(traces=TRACES, max_tokens=640, length=64)
RUNNING = Running(device="cpu", dtype="float32")
FILES = ("stats.safetensors", "inner.safetensors", "profile.json")


def _take(out: Path, **options: Any) -> list[bytes]:
    options = {"inner": 100, "inner_experts": 8, **options}
    profile(CHECKPOINT, ProfileOutput(output=out, **options), TEXT, RUNNING)
    return [(out / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """An undisturbed profile with everything in memory."""
    return _take(tmp_path_factory.mktemp("clean") / "profile")


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers fit into memory, and no hidden states."""

    monkeypatch.setattr(walking, "share_out", tight)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """After how many layers each run in this process went on."""
    seen: list[int] = []
    resumed = WalkState.resumed

    def noted(self: WalkState, walk: Walk, *rest: Any) -> int:
        seen.append(resumed(self, walk, *rest))
        return seen[-1]

    monkeypatch.setattr(WalkState, "resumed", noted)
    yield seen


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("streamed")
def test_streamed_it_is_the_same(clean: list[bytes], tmp_path: Path) -> None:
    assert _take(tmp_path / "profile") == clean
    assert _names(tmp_path) == ["profile"]


MOMENTS = [
    *((InnerWriter, "put_rows", call) for call in (1, 2, 3, 5)),
    *((InnerWriter, "sync", call) for call in (1, 3)),
    *((HiddenStates, "put", call) for call in (3, 7)),
    *((state, "sync", call) for call in (1, 4)),
]


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(("target", "name", "call"), MOMENTS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_killed_at_any_moment_it_goes_on(
    target: object, name: str, call: int, clean: list[bytes], tmp_path: Path, starts: list[int]
) -> None:
    def work() -> None:
        kill_at(target, name, call)()
        _take(tmp_path / "profile")

    assert ended(forked(work)) == -9
    assert _names(tmp_path) == [".profile.walk"]
    assert _take(tmp_path / "profile") == clean
    assert len(starts) == 1
    assert _names(tmp_path) == ["profile"]


@pytest.mark.usefixtures("streamed")
def test_latency_goes_on_as_well(tmp_path: Path, starts: list[int]) -> None:
    def work() -> None:
        kill_at(HiddenStates, "put", 7)()
        _take(tmp_path / "profile", latency=True)

    assert ended(forked(work)) == -9
    _take(tmp_path / "profile", latency=True)
    assert starts == [2]
    profile = load_profile(tmp_path / "profile")
    assert profile.latency is not None
    assert set(profile.latency["block"]) == set(map(str, profile.statistics.layers))


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("other", [{"inner": 99}, {"inner_experts": 9}, {"inner": None}, {"latency": True}], ids=str)
def test_the_state_of_another_question_is_not_gone_on_from(
    other: dict[str, Any], tmp_path: Path, starts: list[int]
) -> None:
    def work() -> None:
        kill_at(HiddenStates, "put", 7)()
        _take(tmp_path / "profile")

    assert ended(forked(work)) == -9
    asked = {"inner": 100, "inner_experts": 8, **other}
    profile(CHECKPOINT, ProfileOutput(output=tmp_path / "profile", **asked), TEXT, RUNNING)
    assert starts == [0]
    assert _names(tmp_path) == ["profile"]


@pytest.mark.usefixtures("streamed")
def test_layers_that_lost_their_inner_products_are_done_again(
    clean: list[bytes], tmp_path: Path, starts: list[int]
) -> None:
    def work() -> None:
        kill_at(HiddenStates, "put", 7)()
        _take(tmp_path / "profile")

    assert ended(forked(work)) == -9
    (folder,) = (tmp_path / ".profile.walk").iterdir()
    (folder / "inner.safetensors").unlink()
    assert _take(tmp_path / "profile") == clean
    assert starts == [0]


def test_a_killed_run_in_memory_leaves_nothing_in_the_way(clean: list[bytes], tmp_path: Path) -> None:
    def work() -> None:
        kill_at(InnerWriter, "put_rows", 3)()
        _take(tmp_path / "profile")

    assert ended(forked(work)) == -9
    assert _take(tmp_path / "profile") == clean
    assert _names(tmp_path) == ["profile"]


def test_without_room_it_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = all_experts.shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"0.00 GB left; lower --inner") as raised:
        patch.setattr(all_experts.shutil, "disk_usage", lambda _folder: free)
        patch.setattr("moesurgeon.pipeline.profile.take_profile", None)
        _take(tmp_path / "profile")
    assert raised.value.exit_code == 5
    assert _names(tmp_path) == []


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(AllExperts, "finish", failing)
    with pytest.raises(MemoryError):
        _take(tmp_path / "profile")
    assert _names(tmp_path) == []


def test_rows_are_exchanged_a_few_at_a_time(
    clean: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_experts, "_EXCHANGED", 8 * 4000)
    monkeypatch.setattr(all_experts, "_DOUBLES", 40000)
    assert _take(tmp_path / "profile") == clean


def test_several_processes_write_the_same_bytes(clean: list[bytes], tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "moesurgeon", "profile", CHECKPOINT, "-o", str(tmp_path / "profile"),
        "--max-tokens", "640", "--length", "64", "--device", "cpu", "--dtype", "float32", "--inner", "100",
        "--inner-experts", "8", "--json", *(part for trace in TRACES for part in ("-t", trace)),
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in ("0", "1"):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    ends = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], ends
    assert json.loads(ends[0][0])["inner"] == {"tokens": 100, "experts": 8}
    assert [(tmp_path / "profile" / name).read_bytes() for name in FILES] == clean
