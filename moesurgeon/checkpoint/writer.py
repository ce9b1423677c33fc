"""Writing shards: a new header, then byte ranges copied inside the kernel and bytes made anew.

What does not change is never decoded: ``copy_file_range`` (which shares blocks on file systems that
can), then ``sendfile``, then plain reads and writes, whichever the file systems allow.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moesurgeon.checkpoint.header import TensorSpec, build_header
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.errors import CheckpointError
from moesurgeon.progress import Advance

# "This pair of files cannot do that": try the next way. Anything else is a real error.
_REFUSALS = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
# Short enough for the progress bar to move and Ctrl-C to be heard, long enough to cost nothing.
_STEP = 64 << 20


@dataclass(frozen=True, slots=True)
class FileRange:
    """``length`` bytes of the source shard ``shard`` from ``offset`` on."""

    shard: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Fresh:
    """``length`` new bytes, made by ``load`` when they are written and not kept."""

    length: int
    load: Callable[[], bytes]


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
    """One file of the output."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors)


def write_shard(plan: ShardPlan, reader: ShardReader, path: Path, advance: Advance) -> None:
    """Write ``plan`` to the new file ``path`` and flush it to the disk."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _write_all(target, build_header((tensor.spec for tensor in plan.tensors), plan.metadata))
        for part in joined(part for tensor in plan.tensors for part in tensor.parts):
            if isinstance(part, Fresh):
                data = part.load()
                assert len(data) == part.length, f"{len(data)} bytes were made where {part.length} were planned"
                _write_all(target, data)
                advance(part.length)
            else:
                copy_range(reader.file_of(part.shard), part.offset, target, part.length, part.shard, advance)
        os.fsync(target)
    finally:
        os.close(target)


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


def copy_range(source: int, offset: int, target: int, length: int, shard: str, advance: Advance) -> None:
    """Append ``length`` bytes of the descriptor ``source`` from ``offset`` on to ``target``."""
    end = offset + length
    for way in (_by_copy_file_range, _by_sendfile, _by_read_and_write):
        try:
            while offset < end:
                done = way(source, offset, target, min(end - offset, _STEP))
                if done == 0:
                    raise CheckpointError(f"{shard} became shorter while it was read; leave it alone and try again")
                offset += done
                advance(done)
        except OSError as error:
            if error.errno not in _REFUSALS or way is _by_read_and_write:
                raise
        else:
            return


def _by_copy_file_range(source: int, offset: int, target: int, length: int) -> int:
    if not hasattr(os, "copy_file_range"):  # not on macOS
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return os.copy_file_range(source, target, length, offset_src=offset)


def _by_sendfile(source: int, offset: int, target: int, length: int) -> int:
    return os.sendfile(target, source, offset, length)


def _by_read_and_write(source: int, offset: int, target: int, length: int) -> int:
    data = os.pread(source, min(length, 1 << 20), offset)
    _write_all(target, data)
    return len(data)


def _write_all(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
