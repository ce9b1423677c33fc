"""A folder that appears whole or not at all.

Work goes into a hidden folder beside the target (same file system, so the last step is a rename).
A run that fails, or is killed, leaves the target as it was; at most a hidden ``.NAME.moesurgeon``
folder stays behind a kill, which the next run clears away. A lock keeps two writers apart.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moesurgeon.errors import OutputError, UsageError


@contextmanager
def staged(target: Path, *, overwrite: bool, sources: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends without an exception.

    A target that exists and is not empty is refused, or with ``overwrite`` replaced after the new one
    is complete. Raises UsageError for that and for a target in or around a source folder, OutputError
    if another process writes the same target or the disk refuses.
    """
    try:
        with _staged(target, overwrite=overwrite, sources=sources) as staging:
            yield staging
    except OSError as error:
        raise OutputError(_disk_trouble(error, target)) from error


@contextmanager
def _staged(target: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> Iterator[Path]:
    target = Path(os.path.abspath(target))
    refuse_unusable(target, overwrite=overwrite, sources=sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.moesurgeon")
    lock = FileLock(target.with_name(f".{target.name}.moesurgeon.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"another moesurgeon is writing {target}; wait for it or choose another folder") from error
    try:
        _clear_after_kill(staging, target)
        # Again: another writer may have finished meanwhile, or a killed one's old target is back.
        refuse_unusable(target, overwrite=overwrite, sources=sources)
        staging.mkdir()
        try:
            yield staging
            sync_tree(staging)
            _install(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        # Before the release: filelock notices a lock file that vanished while it waited for it.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def refuse_unusable(target: Path, *, overwrite: bool, sources: tuple[Path, ...] = ()) -> None:
    """Raise UsageError if ``target`` may not be written, OutputError if it cannot be.

    For commands to call before long work.
    """
    target = Path(os.path.abspath(target))
    try:
        _refuse(target, overwrite=overwrite, sources=sources)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise OutputError(_disk_trouble(error, target)) from error


def _refuse(target: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> None:
    for source in sources:
        real, home = target.resolve(), source.resolve()
        if real.is_relative_to(home) or home.is_relative_to(real):
            raise UsageError(f"the output {target} and the source {source} overlap; choose a folder of its own")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder; choose another output")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"{target} is not empty; choose another folder or add --overwrite")
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise UsageError(f"{target} cannot be made: {parent} is a file; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} may not be written to; choose another folder")


def sync_tree(folder: Path) -> None:
    """Flush the files of ``folder`` and the folders themselves to the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _clear_after_kill(staging: Path, target: Path) -> None:
    """Remove what a killed run left; put back the old target if it was killed between two renames."""
    shutil.rmtree(staging, ignore_errors=True)
    old = _old(target)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.moesurgeon.old")


def _install(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``; what was there goes away only after that."""
    old = _old(target)
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    parent = os.open(target.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    shutil.rmtree(old, ignore_errors=True)


def _disk_trouble(error: OSError, target: Path) -> str:
    what = os.strerror(error.errno) if error.errno else str(error)
    return f"{target} could not be written ({what}); nothing was left behind, free space or choose another folder"
