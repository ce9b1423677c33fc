"""Hashes of what a checkpoint holds, every byte of it."""

from __future__ import annotations

import hashlib

from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.checkpoint.reader import ShardReader, refuse_changed
from moesurgeon.progress import Advance

_STEP = 8 << 20


def hashes_of(checkpoint: Checkpoint, advance: Advance) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes, read in steps of 8 MiB in the order of the files.

    Raises CheckpointError if a shard changes meanwhile.
    """
    hashes: dict[str, str] = {}
    with ShardReader(checkpoint) as reader:
        for name, tensor in checkpoint.tensors.items():
            digest = hashlib.sha256()
            for start in range(0, tensor.nbytes, _STEP):
                piece = reader.read(tensor, start, min(start + _STEP, tensor.nbytes))
                digest.update(piece)
                advance(len(piece))
            hashes[name] = digest.hexdigest()
    refuse_changed(checkpoint)
    return hashes
