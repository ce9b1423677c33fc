"""Reading bytes of tensors: exactly the range asked for, nothing decoded."""

from __future__ import annotations

import hashlib
import json
import os
from types import TracebackType
from typing import Self

from moesurgeon.checkpoint.header import StoredTensor
from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.errors import CheckpointError


class ShardReader:
    """Open shards of a checkpoint, closed together. Not for several threads at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def file_of(self, shard: str) -> int:
        """Return the descriptor of ``shard``, opened on first use."""
        if shard not in self._files:
            self._files[shard] = os.open(self._checkpoint.path_of(shard), os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

    def read(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes ``start`` to ``stop`` (default: all) of ``tensor``.

        Raises CheckpointError if the shard has become shorter since its header was read.
        """
        stop = tensor.nbytes if stop is None else stop
        file, position, end = self.file_of(tensor.shard), tensor.offset + start, tensor.offset + stop
        pieces = []
        while position < end:
            # One pread returns at most 2 GiB on Linux.
            piece = os.pread(file, min(end - position, 1 << 30), position)
            if not piece:
                raise CheckpointError(f"{tensor.shard} became shorter while it was read; leave it alone and try again")
            pieces.append(piece)
            position += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash that identifies the checkpoint: config, names, dtypes, shapes, sampled bytes.

    From each tensor up to 192 bytes are hashed (start, middle, end), so that an edit of any tensor
    as a whole shows, while a checkpoint of any size takes a moment. Independent of the sharding.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    samples: dict[str, bytes] = {}
    with ShardReader(checkpoint) as reader:
        for name, tensor in checkpoint.tensors.items():  # in the order of the bytes: kind to disks
            starts = {0, max(0, tensor.nbytes // 2 - 32), max(0, tensor.nbytes - 64)}
            samples[name] = b"".join(reader.read(tensor, s, min(s + 64, tensor.nbytes)) for s in sorted(starts))
    for name in sorted(samples):
        tensor = checkpoint.tensors[name]
        digest.update(f"\n{name}\n{tensor.dtype}{list(tensor.shape)}\n".encode())
        digest.update(samples[name])
    return digest.hexdigest()
