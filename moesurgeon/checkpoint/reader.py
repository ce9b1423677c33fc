"""Reading bytes of tensors: exactly the range asked for, nothing decoded."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from moesurgeon.checkpoint.header import FileState, StoredTensor
from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.errors import CheckpointError

# Up to here reading all of a tensor is quicker than reading its samples.
_READ_WHOLE = 16384


class ShardReader:
    """Open shards of a checkpoint, closed together. For several threads, which may all read at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[str, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def file_of(self, shard: str) -> int:
        """Return the descriptor of ``shard``, opened on first use.

        Raises CheckpointError if the file is not the one any more whose header was read.
        """
        file = self._files.get(shard)
        if file is not None:
            return file
        with self._opening:
            if shard not in self._files:  # another thread may have been first
                try:
                    file = os.open(self._checkpoint.path_of(shard), os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError as error:
                    raise _changed(shard, "went away") from error
                try:
                    _refuse_changed(self._checkpoint, shard, os.fstat(file))
                except CheckpointError:
                    os.close(file)
                    raise
                self._files[shard] = file
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
            try:
                piece = os.pread(file, min(end - position, 1 << 30), position)
            except OSError as error:
                raise CheckpointError(
                    f"{tensor.shard} cannot be read ({error.strerror}); copy it from elsewhere"
                ) from error
            if not piece:
                raise _changed(tensor.shard, "became shorter")
            pieces.append(piece)
            position += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def refuse_changed(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a shard was written to or replaced since ``checkpoint`` was opened."""
    for shard in checkpoint.headers:
        try:
            stat = checkpoint.path_of(shard).stat()
        except FileNotFoundError as error:
            raise _changed(shard, "went away") from error
        _refuse_changed(checkpoint, shard, stat)


def _refuse_changed(checkpoint: Checkpoint, shard: str, stat: os.stat_result) -> None:
    before, now = checkpoint.headers[shard].state, FileState.of(stat)
    if now != before:
        raise _changed(shard, "became shorter" if now.size < before.size else "changed")


def _changed(shard: str, what: str) -> CheckpointError:
    return CheckpointError(f"{shard} {what} while it was read; leave it alone and try again")


@dataclass(frozen=True, slots=True)
class Identity:
    """Hashes that identify a checkpoint: ``fingerprint`` of all of it, and of its two halves."""

    fingerprint: str
    config: str
    tensors: str


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the one hash of :func:`identity_of` that covers everything."""
    return identity_of(checkpoint).fingerprint


def identity_of(checkpoint: Checkpoint) -> Identity:
    """Return hashes of the config and of the tensors' names, dtypes, shapes and sampled bytes.

    From each tensor up to 192 bytes are hashed (start, middle, end), so that an edit of any tensor
    as a whole shows, while a checkpoint of any size takes a moment. Independent of the sharding.
    """
    config = json.dumps(checkpoint.config, sort_keys=True).encode()
    whole, tensors = hashlib.sha256(config), hashlib.sha256()
    samples: dict[str, bytes] = {}
    with ShardReader(checkpoint) as reader:
        for name, tensor in checkpoint.tensors.items():  # in the order of the bytes: kind to disks
            size = tensor.nbytes
            middle, end = max(0, size // 2 - 32), max(0, size - 64)
            if size <= _READ_WHOLE:  # scales, norms: one call instead of three
                raw = reader.read(tensor)
                samples[name] = b"".join(raw[start : start + 64] for start in sorted({0, middle, end}))
            else:
                samples[name] = b"".join(reader.read(tensor, start, start + 64) for start in (0, middle, end))
    for name in sorted(samples):
        tensor = checkpoint.tensors[name]
        described = f"\n{name}\n{tensor.dtype}{list(tensor.shape)}\n".encode()
        for digest in (whole, tensors):
            digest.update(described)
            digest.update(samples[name])
    return Identity(whole.hexdigest(), hashlib.sha256(config).hexdigest(), tensors.hexdigest())
