"""Where something new could go: what is there already on the way to it."""

from __future__ import annotations

import os
from pathlib import Path

from moesurgeon.errors import UsageError


def nearest(path: Path) -> Path:
    """Return ``path`` or the folder above it that is there; or a link on the way, wherever it leads."""
    path = Path(os.path.abspath(path))
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def what_it_is(path: Path) -> str:
    """Return what to say of something that is there and is no folder."""
    return "is a file" if path.exists() else "is a link that leads nowhere"


def refuse_within(path: Path, option: str, *folders: Path) -> None:
    """Raise UsageError if ``path``, the value of ``option``, lies in one of ``folders`` that a command reads or writes.

    A file that replaced one of theirs would damage them, whatever ``--overwrite`` allows.
    """
    place = Path(os.path.realpath(path))  # resolve() raises for links in a circle
    for folder in folders:
        if place.is_relative_to(os.path.realpath(folder)):
            raise UsageError(
                f"{option} {path} lies in {folder}, which this command reads or writes; choose another place"
            )
