"""Killed at any moment, a write leaves the old or the new, whole; the same command then goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from moesurgeon.checkpoint import install
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.plan import EditPlan
from tests.faults.forked import ended, forked, kill_at, killed
from tests.faults.synthetic import hashes

MOMENTS = 50  # of each kind


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_kill_at_any_moment(
    source: Subject, plan: EditPlan, clean: dict[str, str], tmp_path: Path, overwrite: bool
) -> None:
    """Random moments over one write and a little more; what is left is what the next run starts from.

    How long a write takes depends on what else runs, so the moments follow: earlier after a survivor.
    """
    rng = random.Random(7)
    work = partial(apply, plan, source.checkpoint, tmp_path / "out", overwrite=overwrite)
    began = time.monotonic()
    assert ended(forked(partial(work, overwrite=True))) == 0
    seconds = time.monotonic() - began
    shutil.rmtree(tmp_path / "out")
    died = resumed = attempts = 0
    while died < MOMENTS:
        attempts += 1
        assert attempts < 6 * MOMENTS, "the moments do not fall into the write"
        if overwrite and not (tmp_path / "out").exists():
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text('{"model_type": "old"}')
            (tmp_path / "out" / "model.safetensors").write_text("old")
        before = hashes(tmp_path / "out")
        died_now = killed(forked(work), rng.uniform(0, 1.2 * seconds)) != 0
        died += died_now
        seconds *= 1.05 if died_now else 0.85
        left = hashes(tmp_path / "out")
        assert left in (before, clean)
        assert set(_names(tmp_path)) <= {"out", ".out.moesurgeon", ".out.moesurgeon.lock"}
        if left == clean:
            shutil.rmtree(tmp_path / "out")
        elif rng.random() < 0.4:  # else the next one is killed on top of this
            resumed += work().resumed > 0
            assert hashes(tmp_path / "out") == clean
            assert _names(tmp_path) == ["out"]
            shutil.rmtree(tmp_path / "out")
    assert resumed > 0


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_while_shards_are_flushed(
    source: Subject, plan: EditPlan, clean: dict[str, str], tmp_path: Path, presses: int
) -> None:
    """Nothing can interrupt a flush; when it ends, nothing else begins, and what was flushed is kept."""

    def interrupted() -> None:
        real = os.fsync

        def slow(file: int) -> None:
            time.sleep(0.4)
            real(file)

        os.fsync = slow
        with pytest.raises(KeyboardInterrupt, match=r"goes on from the \d finished shards"):
            apply(plan, source.checkpoint, tmp_path / "out")
        assert threading.active_count() == 1
        time.sleep(0.5)  # would anything write on, it would now

    began = time.monotonic()
    child = forked(interrupted)
    for press in range(presses):
        time.sleep(0.6 if press == 0 else 0.05)
        os.kill(child, signal.SIGINT)
    assert ended(child) == 0
    assert time.monotonic() - began < 3
    assert _names(tmp_path) == [".out.moesurgeon"]
    left = {path.name: hashes(path.parent)[path.name] for path in (tmp_path / ".out.moesurgeon").glob("*.safetensors")}
    assert left and left.items() <= clean.items()
    assert apply(plan, source.checkpoint, tmp_path / "out").resumed == len(left)
    assert hashes(tmp_path / "out") == clean


STEPS = [
    *((os, "fsync", call) for call in (1, 2, 5, 8)),
    *((Path, "rename", call) for call in (1, 2, 4, 7)),
    (Path, "write_text", 3),
    (install, "exchanged", 1),
]


@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
@pytest.mark.parametrize("step", STEPS, ids=[f"{name} {call}" for _, name, call in STEPS])
def test_a_kill_between_two_steps(
    source: Subject,
    plan: EditPlan,
    clean: dict[str, str],
    tmp_path: Path,
    old: dict[str, str],
    step: tuple[object, str, int],
    *,
    swaps: bool,
) -> None:
    """At the seams, where a random moment hardly ever falls; also on file systems that cannot swap."""
    work = partial(apply, plan, source.checkpoint, tmp_path / "out", overwrite=True)

    def die() -> None:
        if not swaps:
            install.exchanged = lambda one, other: False
        kill_at(*step)()
        work()

    assert ended(forked(die)) == -9
    assert hashes(tmp_path / "out") in (old, clean)
    work()
    assert hashes(tmp_path / "out") == clean
    assert _names(tmp_path) == ["out"]


def test_a_kill_between_two_renames_costs_nothing(
    source: Subject, plan: EditPlan, clean: dict[str, str], tmp_path: Path, old: dict[str, str]
) -> None:
    """The one moment at which a file system that cannot swap has no folder of that name."""
    work = partial(apply, plan, source.checkpoint, tmp_path / "out", overwrite=True)

    def die() -> None:
        install.exchanged = lambda one, other: False
        real = Path.rename

        def rename(path: Path, other: Path) -> Path:
            result = real(path, other)
            if path.name == "out":
                os.kill(os.getpid(), 9)
            return result

        Path.rename = rename  # type: ignore[method-assign]
        work()

    assert ended(forked(die)) == -9
    assert hashes(tmp_path / ".out.moesurgeon.old") == old
    with pytest.raises(UsageError, match="not empty"):
        apply(plan, source.checkpoint, tmp_path / "out")  # without leave to replace it
    assert hashes(tmp_path / "out") == old
    work()
    assert hashes(tmp_path / "out") == clean
