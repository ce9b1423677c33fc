"""Disks that are full or closed, two writers, sources that move: an error in a line, and nothing half done."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from moesurgeon.checkpoint.replaceable import CHECKPOINT
from moesurgeon.checkpoint.staging import staged
from moesurgeon.errors import CheckpointError, OutputError, UsageError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery import apply as apply_module
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.faults.forked import FAILED, ended, forked
from tests.faults.synthetic import hashes


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half of the result."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", folder], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small(source: Subject, plan: EditPlan, small_disk: Path) -> None:
    with pytest.raises(OutputError, match="the output needs"):
        apply(plan, source.checkpoint, small_disk / "out")
    assert _names(small_disk) == []


def test_a_disk_that_fills_up(
    source: Subject, plan: EditPlan, clean: dict[str, str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may take the room that was there at the start; what was finished waits until there is more."""
    monkeypatch.setattr(apply_module, "_check_space", lambda folder, needed: None)
    with pytest.raises(OutputError, match=r"No space left on device.*goes on from the \d finished"):
        apply(plan, source.checkpoint, small_disk / "out")
    assert _names(small_disk) == [".out.moesurgeon"]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert apply(plan, source.checkpoint, small_disk / "out").resumed > 0
    assert hashes(small_disk / "out") == clean
    assert _names(small_disk) == ["out"]


@pytest.mark.usefixtures("one_at_a_time")
def test_a_limit_on_files(
    source: Subject, plan: EditPlan, clean: dict[str, str], tmp_path: Path, old: dict[str, str]
) -> None:
    """A quota: EFBIG in the middle of the second shard."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
        with pytest.raises(OutputError, match=f"{os.strerror(27)}.*goes on from the 1 finished"):
            apply(plan, source.checkpoint, tmp_path / "out", overwrite=True)

    assert ended(forked(limited)) == 0
    assert hashes(tmp_path / "out") == old
    assert apply(plan, source.checkpoint, tmp_path / "out", overwrite=True).resumed == 1
    assert hashes(tmp_path / "out") == clean


def test_a_folder_that_may_not_be_written_to() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        closed = Path(place) / "closed"
        closed.mkdir()
        (closed / "out").mkdir()
        for folder in (closed.parent, closed, closed / "out"):
            folder.chmod(0o555)

        def attempt() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)  # nobody: root may write everywhere
            for target in (closed / "new", closed / "out", closed / "out" / "deep" / "down"):
                with (
                    pytest.raises(OutputError, match="may not be written to"),
                    staged(target, CHECKPOINT, overwrite=True),
                ):
                    pytest.fail("it began")

        assert ended(forked(attempt)) == 0
        assert _names(closed) == ["out"]
        closed.parent.chmod(0o755)
        closed.chmod(0o755)


def test_two_writers(source: Subject, plan: EditPlan, clean: dict[str, str], tmp_path: Path) -> None:
    """Whoever comes second is told; the result is whole, whoever wins."""
    work = partial(apply, plan, source.checkpoint, tmp_path / "out")
    for _round in range(5):
        codes = sorted(ended(child) for child in [forked(work), forked(work)])
        assert codes == [0, FAILED]
        assert hashes(tmp_path / "out") == clean
        assert _names(tmp_path) == ["out"]
        shutil.rmtree(tmp_path / "out")


def _copied(source: Subject, folder: Path) -> Subject:
    shutil.copytree(source.root, folder, copy_function=shutil.copy2)
    return open_subject(str(folder))


@pytest.mark.parametrize("change", ["truncated", "written", "replaced", "removed"])
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_source_that_changes(
    source: Subject, plan: EditPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, when: str
) -> None:
    """Between its opening and the end of the copy, by another download into the same folder for example."""
    own = _copied(source, tmp_path / "source")
    path = own.checkpoint.path_of("model-00003-of-00006.safetensors")

    def move() -> None:
        size = path.stat().st_size
        if change == "truncated":
            os.truncate(path, size // 2)
        elif change == "written":
            with path.open("r+b") as file:
                file.seek(size // 3)
                file.write(b"changed")
        else:
            other = path.read_bytes()[:-1] + b"\x00"
            path.unlink()
            if change == "replaced":
                path.write_bytes(other)

    if when == "before":
        move()
    else:
        real, calls = apply_module.write_finished, []

        def moving(*arguments: object) -> None:
            real(*arguments)  # type: ignore[arg-type]
            calls.append(1)
            if len(calls) == {"during": 1, "after": 6}[when]:
                move()

        monkeypatch.setattr(apply_module, "write_finished", moving)
    with pytest.raises(CheckpointError, match=r"model-00003.*(changed|shorter|went away)"):
        apply(plan, own.checkpoint, tmp_path / "out")
    assert _names(tmp_path) == ["source"]


def test_the_target_is_never_the_source_whatever_leads_there(source: Subject, plan: EditPlan, tmp_path: Path) -> None:
    own = _copied(source, tmp_path / "models" / "source")
    before = hashes(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    (tmp_path / "link2").symlink_to(tmp_path / "link")
    for target in (
        tmp_path / "link" / "source",
        tmp_path / "link2" / "source" / "deep" / "out",
        tmp_path / "models" / "x" / ".." / "source",
        tmp_path / "link2" / ".." / "models",
    ):
        with pytest.raises(UsageError, match=r"overlap|not a folder"):
            apply(plan, own.checkpoint, target, overwrite=True)
    assert hashes(tmp_path) == before


def test_the_blobs_of_a_hub_cache_are_source_as_well(source: Subject, plan: EditPlan, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "main", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(source.root, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    before = hashes(blobs)
    cached = open_subject(str(snapshot))
    for target in (blobs, blobs / "out", tmp_path / "hub"):
        with pytest.raises(UsageError, match="overlap"):
            apply(plan, cached.checkpoint, target, overwrite=True)
    assert hashes(blobs) == before


def test_a_bind_mount_leads_to_the_source(source: Subject, plan: EditPlan, tmp_path: Path) -> None:
    own = _copied(source, tmp_path / "models" / "source")
    (tmp_path / "mounted").mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "--bind", tmp_path / "models", tmp_path / "mounted"], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("only root may mount")
    try:
        with pytest.raises(UsageError, match="overlap"):
            apply(plan, own.checkpoint, tmp_path / "mounted" / "source", overwrite=True)
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=True)


def test_what_is_linked_is_never_written_through(
    source: Subject, plan: EditPlan, clean: dict[str, str], tmp_path: Path
) -> None:
    """A folder of hard links into the source is replaced, removed, killed half way: the source's bytes stay."""
    linked = plan_retop(source.anatomy, RetopSpec(top_k=1))
    assert apply(linked, source.checkpoint, tmp_path / "out", link=True).linked == 6
    assert (tmp_path / "out" / "model-00002-of-00006.safetensors").stat().st_nlink > 1
    apply(plan, source.checkpoint, tmp_path / "out", overwrite=True)
    assert hashes(tmp_path / "out") == clean
    apply(linked, source.checkpoint, tmp_path / "out", link=True, overwrite=True)
    middle = open_subject(str(tmp_path / "out"))
    apply(plan, middle.checkpoint, tmp_path / "pruned", link=True)
    apply(linked, source.checkpoint, tmp_path / "out", link=True, overwrite=True)
    assert _names(tmp_path) == ["out", "pruned"]  # that the source stayed is asked after every test
