"""Memory that this process may still take: by the kernel, and by the control groups that it is in."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import psutil

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_FIRST, _SECOND = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def available_bytes() -> int:
    """Return the bytes that this process may still take."""
    return min([int(psutil.virtual_memory().available), *left_in_groups()])


def left_in_groups(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> list[int]:
    """Return what is left in each control group that has a limit: those of this process and all above them.

    ``membership``: the file that names the groups; ``mount``: where their files are, of version 2 or (in the folder
    ``memory``) of version 1. Pages of files count as free, since the kernel takes them back. A container sees its own
    group as the topmost one, whatever the file says.
    """
    found: dict[Path, int] = {}
    for folder in _groups(membership, mount):
        left = _left(folder)
        if left is not None:
            found[folder] = left
    return list(found.values())


def used_bytes() -> int:
    """Return the bytes that this process uses, after freed memory was returned to the system."""
    gc.collect()
    trim()
    return int(psutil.Process().memory_info().rss)


def trim() -> None:
    """Give freed memory back to the kernel, where the C library can do that (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def _groups(membership: Path, mount: Path) -> Iterator[Path]:
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    paths = ["/"]
    for line in lines:
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or "memory" in controllers.split(","):
            paths.append(path)
    for root in (mount, mount / "memory", mount / "unified"):
        for path in paths:
            inside = root / path.lstrip("/")
            yield from (each for each in (inside, *inside.parents) if each == root or root in each.parents)


def _left(folder: Path) -> int | None:
    for limit, usage in (_SECOND, _FIRST):
        try:
            most = (folder / limit).read_text(encoding="ascii").strip()
            if most == "max":
                return None
            used = int((folder / usage).read_text(encoding="ascii"))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            figures = dict(line.split() for line in lines)
            # Version 1 has figures of the group alone, and totals with those below it, as its usage is.
            prefix = "total_" if "total_inactive_file" in figures else ""
            cached = sum(int(figures.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            return max(0, int(most) - used + cached)
        except (OSError, ValueError):
            continue
    return None
