"""Git LFS pointers: small text files that stand where ``git lfs pull`` would put the real ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moesurgeon.errors import CheckpointError

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: the first line, and a bound on the size.
_FIRST_LINE = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 1024
# What a loader reads beside the weights; of pictures and the like a pointer does no harm.
_READ_BY_LOADERS = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".vocab", ".spm", ".py")


def refuse_pointers(root: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if one of the files ``names`` of ``root`` is a Git LFS pointer; absent files are not."""
    pointers = [name for name in names if _is_pointer(root / name)]
    if pointers:
        more = f" and {len(pointers) - 3} more" if len(pointers) > 3 else ""
        are = "is a Git LFS pointer, not the file itself" if len(pointers) == 1 else "are Git LFS pointers, not files"
        raise CheckpointError(f"{', '.join(pointers[:3])}{more} in {root} {are}; run git lfs pull there")


def read_by_loaders(root: Path) -> list[str]:
    """Return the names of the files beside the weights that a loader or tokenizer reads."""
    return sorted(path.name for path in root.iterdir() if path.name.endswith(_READ_BY_LOADERS) and path.is_file())


def _is_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(_FIRST_LINE)) == _FIRST_LINE
