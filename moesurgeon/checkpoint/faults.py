"""Errors of the operating system as what they mean to the one who typed the command: whose file it is.

A file that cannot be read is unusable input (exit code 3); one that cannot be written, or a disk that is full, is an
output that could not be written (5). An error that names a file tells them apart by where it lies.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moesurgeon.errors import InputError, MoeSurgeonError, OutputError

_FREE = "free space, or choose another place"
# Only writing runs into these, and reading through a cache on a disk.
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}


def explained(error: OSError, written: Iterable[Path]) -> MoeSurgeonError | None:
    """Return what ``error`` means where the paths ``written`` are outputs; None if that cannot be told, so it is a bug.

    What is neither an output nor part of the program was given to us to read.
    """
    path = path_of(error)
    if path is None:
        if "temporary directory" in str(error):  # of tempfile
            return OutputError("no folder for temporary files can be written to; set TMPDIR to one with room")
        if error.errno not in FULL:
            return None
        return OutputError(f"the output could not be written ({_reason(error)}); {_FREE}")
    if error.errno in FULL or any(is_below(path, place) for place in written):
        return OutputError(f"{path} could not be written ({_reason(error)}); {_FREE}")
    if any(is_below(path, place) for place in (Path(__file__).parents[1], Path(sys.prefix))):
        return None
    return InputError(unreadable(path, error))


def unreadable(path: Path, error: OSError) -> str:
    """Return what to say of an input that ``error`` keeps from being read."""
    remedies = {
        errno.EACCES: "change its permissions, or those of the folders above it",
        errno.EPERM: "change its permissions, or those of the folders above it",
        errno.ELOOP: "its links lead in a circle: name the file itself",
        errno.EIO: "the disk is damaged, or its connection is: copy the file from elsewhere",
    }
    return f"{path} cannot be read ({_reason(error)}); {remedies.get(error.errno or 0, 'give a path that exists')}"


def path_of(error: OSError) -> Path | None:
    """Return the file that ``error`` is about, if it says so."""
    name = error.filename
    return Path(os.path.abspath(os.fsdecode(name))) if isinstance(name, (str, bytes, os.PathLike)) else None


def is_below(path: Path, place: Path) -> bool:
    """Whether ``path`` is ``place``, lies below it, or is what is worked on beside it (``.NAME...``)."""
    place = Path(os.path.abspath(place))
    return path.is_relative_to(place) or any(
        each.parent == place.parent and each.name.startswith(f".{place.name}.") for each in (path, *path.parents)
    )


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Raise what safetensors makes of an error of the disk at ``path`` as the OSError that it was."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
