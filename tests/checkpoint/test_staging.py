"""A folder appears whole or not at all, whatever happens on the way."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesurgeon.checkpoint import install
from moesurgeon.checkpoint.replaceable import Contents, Kind
from moesurgeon.checkpoint.staging import refuse_unusable, staged
from moesurgeon.errors import OutputError, UsageError

KIND = Kind("a test", "file", (), Contents(files=("file",)))


def _write(target: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with staged(target, KIND, overwrite=overwrite) as staging:
        (staging / "file").write_text(text)


def _listing(folder: Path) -> dict[str, str]:
    """Return all files under ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_there_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "out"
    with staged(target, KIND, overwrite=False) as staging:
        (staging / "file").write_text("new")
        assert not target.exists()
    assert _listing(tmp_path) == {"deep/down/out/file": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_leaves_nothing_new(tmp_path: Path, error: type[BaseException], old: str | None) -> None:
    if old:
        _write(tmp_path / "out", old)
    before = _listing(tmp_path)
    with pytest.raises(error), staged(tmp_path / "out", KIND, overwrite=True) as staging:
        (staging / "file").write_text("half of it")
        raise error
    assert _listing(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if old else [])


def test_an_error_of_the_disk_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"No space left on device.*nothing was left behind"):  # noqa: SIM117
        with staged(tmp_path / "out", KIND, overwrite=False):
            raise OSError(errno.ENOSPC, "full")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    _write(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="not empty; choose another folder or add --overwrite"):
        _write(tmp_path / "out")
    assert _listing(tmp_path) == {"out/file": "old"}
    _write(tmp_path / "out", overwrite=True)
    assert _listing(tmp_path) == {"out/file": "new"}


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _write(tmp_path / "out")
    assert _listing(tmp_path) == {"out/file": "new"}


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    _write(tmp_path / "out", "old")
    with staged(tmp_path / "out", KIND, overwrite=True) as staging:
        (staging / "file").write_text("new")
        assert (tmp_path / "out" / "file").read_text() == "old"
    assert _listing(tmp_path) == {"out/file": "new"}


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "out", "old")
    real = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == ".out.moesurgeon":
            raise OSError(errno.EIO, "broken")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(install, "exchanged", lambda *folders: False)
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        _write(tmp_path / "out", overwrite=True)
    assert _listing(tmp_path) == {"out/file": "old"}


KILLED = """
from moesurgeon.checkpoint.replaceable import ANYTHING, Kind
KIND = Kind("a test", "file", (), ANYTHING)
import os, signal, sys
from pathlib import Path
from moesurgeon.checkpoint import install, staging
target, moment = Path(sys.argv[1]), sys.argv[2]
real = Path.rename

def rename(path, other):
    real(path, other)
    if moment == "between renames" and path == target:
        os.kill(os.getpid(), signal.SIGKILL)

Path.rename = rename
install.exchanged = lambda *folders: False  # as on a file system that cannot swap
with staging.staged(target, KIND, overwrite=True) as folder:
    (folder / "file").write_text("half of it")
    if moment == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["while writing", "between renames"])
def test_what_a_killed_run_leaves_is_cleared_by_the_next(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "out"
    _write(target, "old")
    process = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert target.exists() is (moment == "while writing")
    # Without permission to replace the old folder, it is what the next run finds again, and keeps.
    with pytest.raises(UsageError, match="not empty"):
        _write(target)
    assert _listing(target) == {"file": "old"}
    with pytest.raises(ValueError, match="fails"), staged(target, KIND, overwrite=True):
        raise ValueError("the next one fails, too")
    assert _listing(tmp_path) == {"out/file": "old"}
    _write(target, overwrite=True)
    assert _listing(tmp_path) == {"out/file": "new"}


HOLDING = """
from moesurgeon.checkpoint.replaceable import CHECKPOINT as KIND
import sys, time
from pathlib import Path
from moesurgeon.checkpoint.staging import staged
with staged(Path(sys.argv[1]), KIND, overwrite=False) as folder:
    (folder / "file").write_text("first")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "out"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(target)], **pipes) as first:
        assert first.stdout is not None and first.stdout.readline() == "writing\n"
        start = time.monotonic()
        with pytest.raises(OutputError, match="another moesurgeon is writing"):
            _write(target, overwrite=True)
        assert time.monotonic() - start < 5, "it waited"
        _write(tmp_path / "elsewhere")
        first.communicate()
    assert first.returncode == 0
    assert _listing(tmp_path) == {"out/file": "first", "elsewhere/file": "new"}


def test_a_folder_that_came_up_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run finished between our first look and our lock."""
    from filelock import FileLock

    target, real = tmp_path / "out", FileLock.acquire

    def late(lock: FileLock, *args: object, **kwargs: object) -> object:
        target.mkdir()
        (target / "file").write_text("theirs")
        return real(lock, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(UsageError, match="not empty"):
        _write(target)
    assert _listing(tmp_path) == {"out/file": "theirs"}


def test_a_target_in_or_around_the_source_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / "out", tmp_path / "a", tmp_path, tmp_path / "link" / "out", tmp_path / "link"):
        with pytest.raises(UsageError, match=r"overlap|not a folder"):
            refuse_unusable(target, KIND, overwrite=True, sources=(source,))
    refuse_unusable(tmp_path / "a" / "out", KIND, overwrite=False, sources=(source,))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_or_link_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(UsageError, match="is not a folder"):
            _write(tmp_path / name, overwrite=overwrite)
    assert _listing(tmp_path) == {"file": "mine"}


def test_a_place_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        refuse_unusable(tmp_path / "file" / "out", KIND, overwrite=False)
    with pytest.raises(OutputError, match="File name too long"):
        refuse_unusable(tmp_path / ("x" * 300), KIND, overwrite=False)
    with pytest.raises(OutputError, match="File name too long"):
        _write(tmp_path / ("x" * 250))  # fits itself, but not with what is put around it
    assert _listing(tmp_path) == {"file": "mine"}
