"""Which files a trace is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgeon.errors import TraceError
from moesurgeon.traces.formats import READERS, reader_of

_MOST_NAMES = 20

READABLE = f"a {', '.join(READERS)} file, a folder of them or one saved by datasets"


@dataclass(frozen=True, slots=True)
class FilesRead:
    """Which files of a trace were read, by their ``names`` relative to it, and ``of`` how many."""

    names: tuple[str, ...]
    of: int

    @classmethod
    def below(cls, location: Path, opened: Sequence[Path], of: int) -> FilesRead:
        """Return it for the files that were ``opened`` of the trace at ``location``."""
        names = [file.name if file == location else file.relative_to(location).as_posix() for file in opened]
        return cls(tuple(names), of)

    def as_dict(self) -> dict[str, Any]:
        """Return it as reports have it, with 20 names at most."""
        return {"read": len(self.names), "of": self.of, "names": list(self.names[:_MOST_NAMES])}


def files_of(path: Path) -> list[Path]:
    """Return what to read at ``path``: itself, or the readable files of a plain folder in sorted order.

    Raises TraceError for what is not there, may not be looked at, or holds nothing that can be read.
    """
    try:
        if not path.exists():
            raise TraceError(f"{path}: no such file or folder: check the path")
        if not path.is_dir():
            if reader_of(path) is None:
                raise TraceError(f"{path}: not a kind of file that can be read: give {READABLE}")
            return [path]
        if reader_of(path):
            return [path]
        found = sorted(file for file in _walked(path) if is_trace(file, path))
    except OSError as error:
        raise unreadable(Path(error.filename or path), error) from error
    if not found:
        raise TraceError(f"{path}: a folder without traces: give {READABLE}")
    return found


def is_trace(file: Path, folder: Path) -> bool:
    """Whether ``file`` is one of the traces of ``folder``, by its name.

    A README and ``*.json`` more often describe a dataset than they are part of one.
    """
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    about = file.suffix == ".json" or file.stem == "README"
    return not hidden and not about and file.is_file() and reader_of(file) is not None


def unreadable(path: Path, error: OSError) -> TraceError:
    """Return what to raise where the system does not let ``path`` be looked at."""
    reason = (error.strerror or type(error).__name__).lower()
    return TraceError(f"{path} cannot be read ({reason}): change its permissions, or give another trace")


def _walked(folder: Path) -> Iterator[Path]:
    """Yield all files below ``folder``; OSError for a sub-folder that may not be read, which rglob passes over."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root) / name for name in names)
