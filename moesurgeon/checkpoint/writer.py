"""Writing shards: a new header, then byte ranges that are copied and bytes made anew.

What does not change is never decoded.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moesurgeon.checkpoint.copying import Appender
from moesurgeon.checkpoint.header import BLOCK, TensorSpec, build_header
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.progress import Advance

# Bytes made anew may be as large as a tensor: one at a time, however many shards are being written.
_MAKING = threading.Lock()


@dataclass(frozen=True, slots=True)
class FileRange:
    """``length`` bytes of the source shard ``shard`` from ``offset`` on."""

    shard: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Fresh:
    """``length`` new bytes, made by ``load`` when they are written and not kept.

    ``key`` says which bytes they are without making them, so that a later run knows its own: what has the
    same key (and length, and source) must have the same bytes. For bytes in memory: :func:`content_key`.
    """

    length: int
    load: Callable[[], bytes]
    key: str


Part = FileRange | Fresh


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the output and the parts that its bytes are made of, in order."""

    spec: TensorSpec
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        length = sum(part.length for part in self.parts)
        assert length == self.spec.nbytes, f"{self.spec} is planned with {length} bytes"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file of the output. ``verbatim``: the source shard that it is, header and all, if it is one."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    metadata: Mapping[str, str]
    verbatim: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors)


def write_shard(plan: ShardPlan, reader: ShardReader, path: Path, advance: Advance) -> None:
    """Write ``plan`` to the new file ``path`` and flush it to the disk."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        if plan.verbatim:
            # From the first byte on the blocks lie alike, so a file system that can share them does.
            file = reader.file_of(plan.verbatim)
            Appender(target, advance).copy(file, 0, os.fstat(file).st_size, plan.verbatim)
        else:
            _write_parts(plan, reader, target, advance)
        os.fsync(target)
    finally:
        os.close(target)


def _write_parts(plan: ShardPlan, reader: ShardReader, target: int, advance: Advance) -> None:
    file = Appender(target, advance)
    file.write(_header_of(plan))
    for part in joined(part for tensor in plan.tensors for part in tensor.parts):
        if isinstance(part, FileRange):
            file.copy(reader.file_of(part.shard), part.offset, part.length, part.shard)
            continue
        with _MAKING:
            data = part.load()
            assert len(data) == part.length, f"{len(data)} bytes were made where {part.length} were planned"
            file.write(data)
            del data  # not until the next one is made
        advance(part.length)


def content_key(data: bytes) -> str:
    """Return the key of bytes that no rule makes again: their hash."""
    return f"sha256 {hashlib.sha256(data).hexdigest()}"


def beginning(plan: ShardPlan, reader: ShardReader) -> tuple[bytes, int]:
    """Return the header that ``plan``'s file begins with, and the size that it has when it is whole."""
    if plan.verbatim:
        file = reader.file_of(plan.verbatim)
        size = os.fstat(file).st_size
        return os.pread(file, size - plan.nbytes, 0), size
    header = _header_of(plan)
    return header, len(header) + plan.nbytes


def _header_of(plan: ShardPlan) -> bytes:
    """Return the header of ``plan``, as long as it takes for most bytes to lie within blocks as in the source.

    Those are shared where the file system can, also after a cut: experts are mostly whole blocks.
    """
    places: Counter[int] = Counter()
    position = 0
    for part in joined(part for tensor in plan.tensors for part in tensor.parts):
        if isinstance(part, FileRange):
            places[(part.offset - position) % BLOCK] += part.length
        position += part.length
    fitting = [place for place, _ in places.most_common() if place % 8 == 0]  # of 8: tensors stay aligned
    return build_header((tensor.spec for tensor in plan.tensors), plan.metadata, fitting[0] if fitting else None)


def joined(parts: Iterable[Part]) -> Iterator[Part]:
    """Yield ``parts`` with ranges that follow each other in the same shard made one."""
    last: FileRange | None = None
    for part in parts:
        if part.length == 0:
            continue
        if isinstance(part, FileRange):
            if last and last.shard == part.shard and last.offset + last.length == part.offset:
                last = FileRange(last.shard, last.offset, last.length + part.length)
                continue
            if last:
                yield last
            last = part
        else:
            if last:
                yield last
                last = None
            yield part
    if last:
        yield last
