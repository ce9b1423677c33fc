"""The safetensors header: parsed without trust, written without surprises.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes. The JSON maps
each name to ``{"dtype", "shape", "data_offsets": [begin, end]}`` (offsets count from the end of the
header) plus an optional ``__metadata__`` of strings. https://github.com/huggingface/safetensors

A checkpoint is untrusted input: whatever the header says is checked against the file before use.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moesurgeon.errors import CheckpointError

# The limit of the safetensors library itself; real headers stay under 20 MB.
MAX_HEADER_BYTES = 100_000_000
# Parsed, a value of two characters takes up to 130 bytes. The largest index that we know has 140,000 entries.
_MAX_VALUES = 4_000_000
# What file systems share as a whole.
BLOCK = 4096
# The limit of torch and numpy; it bounds the product of the sizes, too.
MAX_DIMENSIONS = 64

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, wherever its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorSpec):
    """A tensor in a shard: ``offset`` is the position of its first byte in the file."""

    shard: str
    offset: int


class FileState(NamedTuple):
    """What tells that a file is still the one that was read. Not ctime: a new hard link changes it."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileState:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True, slots=True)
class Header:
    """The parsed header of one shard, tensors in the order of their bytes, and the file that it was read from."""

    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]
    state: FileState


def read_header(path: Path, shard: str, names: Mapping[str, str] | None = None) -> Header:
    """Parse and check the header of the safetensors file ``path``.

    ``names``: those that are known already, each under itself, so that none is held twice.

    Raises CheckpointError if anything in it disagrees with the file or with itself.
    """
    with path.open("rb") as file:
        state = FileState.of(os.fstat(file.fileno()))
        size = state.size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or length > size - 8:
            raise _damaged(shard, "is truncated: its header does not fit into the file")
        if length > MAX_HEADER_BYTES:
            raise _damaged(shard, f"claims a header of {length} bytes")
        raw = file.read(length)
    entries = parse_json(raw, shard)
    metadata = entries.pop("__metadata__", {})
    if not _is_string_map(metadata):
        raise _damaged(shard, "has a __metadata__ that is not a map of strings")
    known = {} if names is None else names
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    tensors = [
        _stored_tensor(known.get(name, name), entry, shard, 8 + length, shapes) for name, entry in entries.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise _damaged(shard, f"is inconsistent: {tensor.name!r} {problem}")
        end += tensor.nbytes
    if end != size:
        what = "is truncated" if end > size else "has bytes that belong to no tensor"
        raise _damaged(shard, f"{what}: {size} bytes on disk, {end} by its header")
    return Header(tuple(tensors), metadata, state)


def build_header(tensors: Iterable[TensorSpec], metadata: Mapping[str, str], place: int | None = None) -> bytes:
    """Return length prefix and JSON for ``tensors`` laid out one after the other in this order.

    Padded with spaces to a multiple of 8 bytes, so that the data is aligned; given ``place`` (a multiple of 8),
    until the data begins there within a block.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 if place is None else (place - 8 - len(text)) % BLOCK)
    return struct.pack("<Q", len(text)) + text


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys, and nesting and numbers of values that no checkpoint has."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _damaged(where, "names the same key twice")
        return found

    if sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise _damaged(where, "holds more values than any checkpoint has")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=no_duplicates)
        if b"\\u" in raw:  # only an escape can smuggle in half a character, which no file could be given
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"is not valid JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise _damaged(where, "is not a JSON object")
    return value


def _stored_tensor(
    name: str, entry: object, shard: str, data_start: int, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> StoredTensor:
    """Return the tensor of a header's ``entry``. ``shapes``: of the others, as many tensors have the same."""
    if not isinstance(entry, dict):
        raise _damaged(shard, f"describes {name!r} with something that is not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        said = dtype[:40] if isinstance(dtype, str) else type(dtype).__name__
        raise _damaged(shard, f"gives {name!r} the unknown dtype {said!r}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(shard, f"gives {name!r} a shape or offsets that are not sizes")
    if max(itertools.accumulate(shape, operator.mul), default=1) >= 1 << 64:  # a zero behind it hides nothing
        raise _damaged(shard, f"gives {name!r} a shape whose sizes multiply to more than 64 bits hold")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise _damaged(shard, f"gives {name!r} {offsets[1] - offsets[0]} bytes, but its shape needs {bits} bits")
    sizes = tuple(shape)
    return StoredTensor(name, sys.intern(dtype), shapes.setdefault(sizes, sizes), shard, data_start + offsets[0])


def _are_sizes(value: object) -> bool:
    # bool is an int to Python, but not to us; 2^63 keeps every product below what os.pread takes.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _is_string_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _damaged(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where} {problem}; download or convert it again")
