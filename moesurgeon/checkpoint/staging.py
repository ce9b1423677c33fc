"""A folder that appears whole or not at all.

Work goes into a hidden folder beside the target (same file system, so the last step is a rename).
A run that fails, or is killed, leaves the target as it was; at most a hidden ``.NAME.moesurgeon``
folder stays, whose finished shards the same command takes over and any other clears away. A lock
keeps two writers apart.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from moesurgeon.checkpoint.faults import is_below, path_of, unreadable
from moesurgeon.checkpoint.install import install, recover_old, sync
from moesurgeon.checkpoint.places import nearest, what_it_is
from moesurgeon.checkpoint.replaceable import Kind, refuse_strange
from moesurgeon.checkpoint.resume import discard_state, finished_shards, open_staging
from moesurgeon.errors import CheckpointError, InputError, OutputError, UsageError


@contextmanager
def staged(
    target: Path, kind: Kind, *, overwrite: bool, sources: tuple[Path, ...] = (), digest: str | None = None
) -> Iterator[Path]:
    """Yield a folder that becomes ``target`` when the block ends without an exception.

    It is empty, or with a ``digest`` (of ``resume.digest_of``) holds the shards that an earlier run with
    the same one has finished. Those stay for the next run after Ctrl-C or an error of the disk.
    A target that exists and is not empty is refused, or with ``overwrite`` replaced after the new one
    is complete, if it is of this ``kind`` and holds nothing else by then. Raises UsageError for that and for a
    target in or around a source folder, CheckpointError if a source cannot be read, OutputError if another
    process writes the same target or the disk refuses.
    """
    target = Path(os.path.abspath(target))
    try:
        with _staged(target, kind, overwrite=overwrite, sources=sources, digest=digest) as staging:
            yield staging
    except OSError as error:
        if (path := path_of(error)) is not None and any(is_below(path, source) for source in sources):
            raise CheckpointError(unreadable(path, error)) from error
        raise OutputError(_disk_trouble(error, target)) from error
    except KeyboardInterrupt as error:
        if waiting := _waiting(target):
            raise KeyboardInterrupt(f"interrupted; {waiting}") from error
        raise


@contextmanager
def _staged(
    target: Path, kind: Kind, *, overwrite: bool, sources: tuple[Path, ...], digest: str | None
) -> Iterator[Path]:
    refuse_unusable(target, kind, overwrite=overwrite, sources=sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _staging(target)
    lock = FileLock(target.with_name(f".{target.name}.moesurgeon.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"another moesurgeon is writing {target}; wait for it or choose another folder") from error
    try:
        recover_old(target)
        # Again: another writer may have finished meanwhile, or a killed one's old target is back.
        refuse_unusable(target, kind, overwrite=overwrite, sources=sources)
        resumable = False
        try:
            open_staging(staging, digest)
            yield staging
            sync_tree(staging, besides=finished_shards(staging))
            refuse_unusable(target, kind, overwrite=overwrite)  # what was put there meanwhile is not ours to remove
            discard_state(staging)
            install(staging, target)
        except (OSError, UsageError, KeyboardInterrupt):
            resumable = bool(finished_shards(staging))
            raise
        finally:
            if not resumable:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        # Before the release: filelock notices a lock file that vanished while it waited for it.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def refuse_unusable(target: Path, kind: Kind, *, overwrite: bool, sources: tuple[Path, ...] = ()) -> None:
    """Raise UsageError if ``target`` may not be written, OutputError if it cannot be.

    For commands to call before long work. With ``overwrite`` only a folder of this ``kind`` may be replaced.
    """
    target = Path(os.path.abspath(target))
    try:
        _refuse(target, kind, overwrite=overwrite, sources=sources)
    except OSError as error:
        if (path := path_of(error)) is not None and any(is_below(path, source) for source in sources):
            raise InputError(unreadable(path, error)) from error
        # A name that is too long, a folder that may not be read.
        raise OutputError(_disk_trouble(error, target)) from error


def _refuse(target: Path, kind: Kind, *, overwrite: bool, sources: tuple[Path, ...]) -> None:
    for source in sources:
        if _is_in(target, source) or _is_in(source, target):
            raise UsageError(f"the output {target} and the source {source} overlap; choose a folder of its own")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder; choose another output")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise UsageError(f"{target} is not empty; choose another folder or add --overwrite")
        refuse_strange(target, kind)
    parent = nearest(target.parent)
    if not parent.is_dir():
        raise UsageError(f"{target} cannot be made: {parent} {what_it_is(parent)}; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} may not be written to; choose another folder")


def refuse_place(folder: Path, option: str) -> None:
    """Raise UsageError or OutputError now if nothing could be written into ``folder``, the value of ``option``.

    It is made where it is not there; what is in it already stays.
    """
    try:
        there = nearest(folder)
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # raises for a name that is too long
        if not there.is_dir():
            raise UsageError(f"{option} {folder}: {there} {what_it_is(there)}; choose another folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"{option} {folder}: {there} may not be written to; choose another folder")
    except OSError as error:
        raise OutputError(f"{option} {folder} cannot be made ({error.strerror}); choose another folder") from error


def sync_tree(folder: Path, *, besides: Set[Path] = frozenset()) -> None:
    """Flush the files of ``folder``, ``besides`` those that are already, and the folders themselves to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path not in besides:
            sync(path)


def overlap(one: Path, other: Path) -> bool:
    """Whether one of two folders, which need not be there yet, is the other or would lie in it."""
    real = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    named = real[0].is_relative_to(real[1]) or real[1].is_relative_to(real[0])
    return named or _is_in(one, other) or _is_in(other, one)


def _is_in(inner: Path, outer: Path) -> bool:
    """Whether ``inner`` is ``outer`` or would lie below it, whatever links and mounts lead there."""
    real = Path(os.path.realpath(inner))  # not resolve(), which raises RuntimeError for links in a circle
    return outer.exists() and any(folder.exists() and folder.samefile(outer) for folder in (real, *real.parents))


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.moesurgeon")


def _waiting(target: Path) -> str:
    """Say what a further run can take over; nothing if there is nothing."""
    staging = _staging(target)
    count = len(finished_shards(staging))
    return f"the same command goes on from the {count} finished shards in {staging}" if count else ""


def _disk_trouble(error: OSError, target: Path) -> str:
    what = os.strerror(error.errno) if error.errno else str(error)
    waiting = _waiting(target)
    then = f"free space, then {waiting}" if waiting else "nothing was left behind, free space or choose another folder"
    return f"{target} could not be written ({what}); {then}"
