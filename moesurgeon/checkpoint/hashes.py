"""Hashes of what a checkpoint holds, every byte of it."""

from __future__ import annotations

import hashlib

from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.checkpoint.reader import ShardReader, refuse_changed
from moesurgeon.checkpoint.values import count_not_finite
from moesurgeon.progress import Advance

_STEP = 8 << 20


def hashes_of(checkpoint: Checkpoint, advance: Advance, not_finite: dict[str, int] | None = None) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes, read in steps of 8 MiB in the order of the files.

    ``not_finite``: is given how many values of a tensor are NaN or infinite, where there are any. Raises
    CheckpointError if a shard changes meanwhile.
    """
    hashes: dict[str, str] = {}
    with ShardReader(checkpoint) as reader:
        for name, tensor in checkpoint.tensors.items():
            digest = hashlib.sha256()
            for start in range(0, tensor.nbytes, _STEP):
                piece = reader.read(tensor, start, min(start + _STEP, tensor.nbytes))
                digest.update(piece)
                if not_finite is not None and (count := count_not_finite(tensor.dtype, piece)):
                    not_finite[name] = not_finite.get(name, 0) + count
                advance(len(piece))
            hashes[name] = digest.hexdigest()
    refuse_changed(checkpoint)
    return hashes
