"""The last step of a write: a finished folder takes its name, in one step where the system can.

``renameat2(RENAME_EXCHANGE)`` swaps old and new, so that there is a whole folder under the name at
every moment. Where the kernel or the file system lacks it, the old folder waits under a hidden name
between two renames, and the next run brings it back if this one was killed there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_AT_FDCWD = -100  # linux/fcntl.h: paths count from the working directory
_RENAME_EXCHANGE = 2  # linux/fs.h


def install(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``; what was there goes away only after that."""
    if not target.exists():
        staging.rename(target)
    elif not exchanged(staging, target):
        _by_two_renames(staging, target)
    sync(target.parent)
    shutil.rmtree(_old(target), ignore_errors=True)


def recover_old(target: Path) -> None:
    """Put back the old target of a run that was killed between two renames."""
    old = _old(target)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def exchanged(one: Path, other: Path) -> bool:
    """Swap two folders and return True, or False where the system cannot; nothing has changed then."""
    import ctypes  # here: only a replaced folder needs it

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28; musl and macOS lack it
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    # A real error shows again, with its reason, in the renames that follow a refusal.
    return bool(call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _by_two_renames(staging: Path, target: Path) -> None:
    old = _old(target)
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.moesurgeon.old")
