"""Where something new could go: what is there already on the way to it."""

from __future__ import annotations

import os
from pathlib import Path


def nearest(path: Path) -> Path:
    """Return ``path`` or the folder above it that is there; or a link on the way, wherever it leads."""
    path = Path(os.path.abspath(path))
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def what_it_is(path: Path) -> str:
    """Return what to say of something that is there and is no folder."""
    return "is a file" if path.exists() else "is a link that leads nowhere"
