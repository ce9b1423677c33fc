"""A file that appears whole or not at all, and replaces another only where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from moesurgeon.checkpoint.install import sync
from moesurgeon.checkpoint.places import nearest, what_it_is
from moesurgeon.checkpoint.replaceable import CHECKPOINT
from moesurgeon.errors import OutputError, UsageError


def refuse_file(path: Path, option: str, *, overwrite: bool, makes_folders: bool = False) -> None:
    """Raise now what writing ``path``, the value of ``option``, would raise later.

    UsageError if it exists (``overwrite``: and is not a file), or if its folder does not and ``makes_folders`` does
    not say that it is made; OutputError if it cannot be written there.
    """
    try:
        if path.is_dir() or (os.path.lexists(path) and not path.exists()):
            raise UsageError(f"{option} {path} exists and is not a file; name another")
        if path.exists() and not overwrite:
            raise UsageError(f"{option} {path} exists; name another file or add --overwrite")
        folder = path.absolute().parent
        if path.exists() and CHECKPOINT.is_kind_of(folder):
            raise UsageError(f"{option} {path} is a file of the checkpoint {folder}; choose another place")
        there = nearest(folder)
        if not there.is_dir():
            raise UsageError(f"{option} {path}: {there} {what_it_is(there)}; choose another place")
        if there != folder and not makes_folders:
            raise UsageError(f"{option} {path}: there is no folder {folder}; make it first")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"{option} {path}: {there} may not be written to; choose another place")
        if there == folder:
            with suppress(FileNotFoundError):
                os.lstat(_beside(path, "part"))  # its name may be too long
    except OSError as error:
        raise OutputError(f"{option} {path} cannot be written ({error.strerror}); choose another place") from error


@contextmanager
def whole_file(path: Path, *, overwrite: bool, makes_folders: bool = False) -> Iterator[Path]:
    """Yield the path of a new file that becomes ``path`` when the block ends without an exception.

    Its folder has to be there, or is made if ``makes_folders`` says so. One process at a time writes it; another is
    refused at once. Raises UsageError for a file that came up meanwhile, OutputError where the disk refuses.
    """
    path = path.absolute()
    part = _beside(path, "part")
    try:
        with ExitStack() as stack:
            if makes_folders:
                stack.enter_context(_folders(path.parent))
            path.parent.stat()  # the lock would make it
            lock = FileLock(_beside(path, "lock"))
            lock.acquire(timeout=0)
            stack.callback(lock.release)
            stack.callback(Path(lock.lock_file).unlink, missing_ok=True)
            stack.callback(part.unlink, missing_ok=True)
            part.unlink(missing_ok=True)  # of a run that was killed
            yield part
            sync(part)
            if overwrite:
                part.replace(path)
            else:
                _named(part, path)
            sync(path.parent)
    except Timeout as error:
        raise OutputError(f"another moesurgeon is writing {path}; wait for it or name another file") from error
    except OSError as error:
        raise OutputError(f"{path} could not be written ({error.strerror}); choose another place") from error


def write_whole(path: Path, text: str) -> None:
    """Write or replace a file that is there whole or not at all; for files of our own folders."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _named(part: Path, path: Path) -> None:
    """Give ``part`` the name ``path``, which must not be there."""
    try:
        os.link(part, path)
    except FileExistsError as error:
        raise UsageError(f"{path} came up meanwhile; name another file or add --overwrite") from error
    except OSError:  # a file system without links
        if path.exists():
            raise UsageError(f"{path} came up meanwhile; name another file or add --overwrite") from None
        part.rename(path)


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make ``folder``; where nothing comes to lie in it, what was made goes away again."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for each in made:
                each.rmdir()
        raise


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")
