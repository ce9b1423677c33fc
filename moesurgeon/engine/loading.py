"""From byte ranges of shards to tensors in memory: read, cast, dequantised, each straight into its place."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

import torch

from moesurgeon.checkpoint.header import StoredTensor
from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.engine.destinations import Destinations, Piece
from moesurgeon.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip
"""torch's dtypes by the names that safetensors has for them."""

# What is read at once where a tensor cannot be read into its place: of another dtype, or for another device.
_SCRATCH = 16 << 20


class Loader:
    """Reads the tensors of a checkpoint into the places that ``destinations`` gives them. For one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, reader: ShardReader, destinations: Destinations) -> None:
        self._checkpoint = checkpoint
        self._reader = reader
        self._destinations = destinations
        self._scratch = torch.empty(0, dtype=torch.uint8)
        # Copies go beside the computation; its own stream is not theirs to wait for.
        self._streams: dict[torch.device, torch.Stream] = {}

    def fill(self, tensors: Mapping[str, torch.Tensor], stop: threading.Event | None = None) -> None:
        """Fill ``tensors``, by target name, in the order of the bytes on disk; leave off when ``stop`` is set.

        Raises CheckpointError if a shard changes while it is read.
        """
        stored = self._checkpoint.tensors
        work = [
            (stored[piece.source], piece, tensor)
            for name, tensor in tensors.items()
            for piece in self._destinations.pieces[name]
        ]
        work.sort(key=lambda item: (item[0].shard, item[0].offset))
        for spec, piece, tensor in work:
            if stop is not None and stop.is_set():
                return
            place = piece.view(tensor)
            if piece.scale is not None:
                self._dequantise(spec, stored[piece.scale], place)
            elif place.device.type != "cpu" or DTYPES[spec.dtype] != place.dtype:
                self._convert(spec, place)
            else:
                self._read_into(spec, 0, place.view(-1).view(torch.uint8))

    def _convert(self, spec: StoredTensor, place: torch.Tensor) -> None:
        """Read in steps, and cast or send each to its place."""
        dtype = DTYPES[spec.dtype]
        flat = place.view(-1)
        step = _SCRATCH // dtype.itemsize
        for start in range(0, flat.numel(), step):
            stop = min(start + step, flat.numel())
            piece = self._staged((stop - start) * dtype.itemsize, pinned=place.device.type != "cpu")
            self._read_into(spec, start * dtype.itemsize, piece)
            self._send(piece.view(dtype), flat[start:stop])

    def _dequantise(self, spec: StoredTensor, scale: StoredTensor, place: torch.Tensor) -> None:
        """Multiply FP8 weights [.., M, N] by the scale of their block, in float32 as transformers does."""
        rows, columns = self._destinations.scale_block
        high, wide = spec.shape[-2:]
        grid = (*spec.shape[:-2], -(-high // rows), -(-wide // columns))
        if scale.shape != grid or scale.dtype not in DTYPES:
            raise CheckpointError(
                f"{scale.name} has shape {list(scale.shape)}, blocks of {rows} x {columns} make it {list(grid)}"
            )
        weights = self._whole(spec).float()
        scales = self._whole(scale).float().repeat_interleave(rows, -2)[..., :high, :]
        weights *= scales.repeat_interleave(columns, -1)[..., :wide]
        self._send(weights, place.view(spec.shape))

    def _whole(self, spec: StoredTensor) -> torch.Tensor:
        memory = torch.empty(spec.nbytes, dtype=torch.uint8)
        self._read_into(spec, 0, memory)
        return memory.view(DTYPES[spec.dtype]).view(spec.shape)

    def _staged(self, size: int, *, pinned: bool) -> torch.Tensor:
        """Return ``size`` bytes of memory that is used again and again; pinned where a device copies from it."""
        if self._scratch.numel() < size or (pinned and not self._scratch.is_pinned()):
            self._scratch = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._scratch[:size]

    def _send(self, values: torch.Tensor, place: torch.Tensor) -> None:
        if place.device.type == "cpu":
            place.copy_(values)
            return
        stream = self._streams.setdefault(place.device, torch.Stream(place.device))
        with stream:
            place.copy_(values, non_blocking=True)
        stream.synchronize()  # the scratch is written again next

    def _read_into(self, spec: StoredTensor, start: int, memory: torch.Tensor) -> None:
        """Fill ``memory`` (bytes) with those of ``spec`` from ``start`` on."""
        file, view = self._reader.file_of(spec.shard), memoryview(memory.numpy())  # type: ignore[arg-type]  # numpy has it, its types do not say so
        position = spec.offset + start
        while view:
            done = os.preadv(file, [view[: 1 << 30]], position)
            if not done:
                raise CheckpointError(f"{spec.shard} became shorter while it was read; leave it alone and try again")
            view = view[done:]
            position += done


def piece_values(spec_dtype: str, raw: bytes, shape: Sequence[int]) -> torch.Tensor:
    """Return ``raw``, new bytes of a stored dtype, as a tensor of ``shape``."""
    memory = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return memory.view(DTYPES[spec_dtype]).view(*shape)


__all__ = ["DTYPES", "Loader", "Piece", "piece_values"]
