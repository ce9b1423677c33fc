"""Taking over the shards that a killed or failed run has finished.

A staging folder holds a small state file with a digest of the source, of every byte range that goes
into the result, and of the keys of bytes made anew. A run with the same digest keeps the finished
shards of the one before it; with any other the folder is cleared. A shard under its own name is
finished: it is written as ``.part``, flushed, and only then renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

import moesurgeon
from moesurgeon.checkpoint.install import sync
from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.checkpoint.writer import FileRange, ShardPlan, beginning, write_shard
from moesurgeon.progress import Advance

STATE_NAME = ".resume"
_PART = ".part"  # not after the shard's name: that may be as long as the file system allows
_SHARDS = "*.safetensors"


def digest_of(plans: Iterable[ShardPlan], source: Checkpoint, fingerprint: str, *, link: bool) -> str:
    """Return a hash of what is written and of the source as it was when it was opened.

    ``link``: whether shards are linked, which keeps the headers that the source has. New bytes are not
    made for it: their keys take part.
    """
    digest = hashlib.sha256()
    states = {shard: header.state for shard, header in source.headers.items()}
    _update(digest, [moesurgeon.__version__, fingerprint, states, link])
    for plan in plans:
        _update(digest, [plan.name, dict(plan.metadata)])
        for tensor in plan.tensors:
            parts = [
                [part.shard, part.offset, part.length] if isinstance(part, FileRange) else [part.key, part.length]
                for part in tensor.parts
            ]
            _update(digest, [tensor.spec.name, tensor.spec.dtype, tensor.spec.shape, parts])
    return digest.hexdigest()


def open_staging(staging: Path, digest: str | None) -> None:
    """Make ``staging``, or keep it with its finished shards if they were written for ``digest``."""
    if digest is not None and not staging.is_symlink() and _read(staging / STATE_NAME) == digest:
        for path in staging.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != STATE_NAME and not (path.match(_SHARDS) and _is_own(path)):
                path.unlink()
        return
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    if digest is not None:
        (staging / _PART).write_text(digest, encoding="ascii")
        (staging / _PART).rename(staging / STATE_NAME)
        sync(staging)


def finished_shards(staging: Path) -> frozenset[Path]:
    """Return the shards that a further run could take over: they are flushed, and will not be written to again."""
    try:
        if not (staging / STATE_NAME).is_file():
            return frozenset()
        return frozenset(path for path in staging.glob(_SHARDS) if _is_own(path))
    except OSError:  # asked after something failed: a folder that cannot be read holds nothing to take over
        return frozenset()


def is_finished(plan: ShardPlan, staging: Path, reader: ShardReader) -> bool:
    """Whether the shard of ``plan`` can be taken over: header and size are right, and the digest knew the rest."""
    path = staging / plan.name
    if not path.is_file() or not _is_own(path):
        return False
    header, size = beginning(plan, reader)
    if path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def write_finished(plan: ShardPlan, reader: ShardReader, staging: Path, advance: Advance) -> None:
    """Write the shard of ``plan`` into ``staging``, where it gets its name once it is flushed."""
    part = staging / f"{_PART}{threading.get_ident()}"  # several are written at once
    try:
        write_shard(plan, reader, part, advance)
        part.rename(staging / plan.name)
    except BaseException:
        part.unlink(missing_ok=True)  # an incomplete shard only takes up space on a full disk
        raise


def discard_state(staging: Path) -> None:
    """Remove the state file: from here on the folder is the result."""
    (staging / STATE_NAME).unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    """Whether ``path`` is a file of its own: a hard link into the source is not what a copy would be."""
    return not path.is_symlink() and path.lstat().st_nlink == 1


def _read(path: Path) -> str | None:
    return path.read_text(encoding="ascii", errors="replace") if path.is_file() else None


def _update(digest: hashlib._Hash, value: object) -> None:
    digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
