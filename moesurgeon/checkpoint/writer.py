"""Writing shards: a new header, then byte ranges copied inside the kernel and bytes made anew.

What does not change is never decoded: ``copy_file_range`` (which shares blocks on file systems that
can), then ``sendfile``, then plain reads and writes, whichever the file systems allow.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moesurgeon.checkpoint.header import TensorSpec, build_header
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.errors import CheckpointError
from moesurgeon.progress import Advance

# "This pair of files cannot do that": try the next way. Anything else is a real error.
_REFUSALS = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
_BLOCK = 4096
# Short enough for the progress bar to move and Ctrl-C to be heard, long enough to cost nothing.
_STEP = 64 << 20
# Of the buffer, which is used again and again: new memory for every read costs as much as the copy.
_BUFFERED = 1 << 20


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
            copy_range(file, 0, target, os.fstat(file).st_size, plan.verbatim, advance)
            os.fsync(target)
            return
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


def content_key(data: bytes) -> str:
    """Return the key of bytes that no rule makes again: their hash."""
    return f"sha256 {hashlib.sha256(data).hexdigest()}"


def beginning(plan: ShardPlan, reader: ShardReader) -> tuple[bytes, int]:
    """Return the header that ``plan``'s file begins with, and the size that it has when it is whole."""
    if plan.verbatim:
        file = reader.file_of(plan.verbatim)
        size = os.fstat(file).st_size
        return os.pread(file, size - plan.nbytes, 0), size
    header = build_header((tensor.spec for tensor in plan.tensors), plan.metadata)
    return header, len(header) + plan.nbytes


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
    """Append ``length`` bytes of the descriptor ``source`` from ``offset`` on to ``target``.

    Where source and target lie alike within their blocks, inside the kernel, which may share the blocks;
    elsewhere (after every cut) through a buffer: ext4 moves misaligned ranges page by page, and measured
    1.7 times slower to copy and twice as slow to flush.
    """
    end = offset + length
    shift = os.lseek(target, 0, os.SEEK_CUR) - offset
    is_aligned = shift % _BLOCK == 0
    buffered = partial(_by_read_and_write, memoryview(bytearray(min(length, _BUFFERED))))
    ways = (_by_copy_file_range, _by_sendfile, buffered) if is_aligned else (buffered,)
    for way in ways:
        try:
            while offset < end:
                done = way(source, offset, target, min(end - offset, _STEP))
                if done == 0:
                    raise CheckpointError(f"{shard} became shorter while it was read; leave it alone and try again")
                _begin_flush(target, offset + shift, done)
                offset += done
                advance(done)
        except OSError as error:
            if error.errno not in _REFUSALS or way is buffered:
                raise
        else:
            return


def _by_copy_file_range(source: int, offset: int, target: int, length: int) -> int:
    if not hasattr(os, "copy_file_range"):  # not on macOS
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return os.copy_file_range(source, target, length, offset_src=offset)


def _by_sendfile(source: int, offset: int, target: int, length: int) -> int:
    return os.sendfile(target, source, offset, length)


def _by_read_and_write(buffer: memoryview, source: int, offset: int, target: int, length: int) -> int:
    done = os.preadv(source, [buffer[:length]], offset)
    _write_all(target, buffer[:done])
    return done


def _begin_flush(target: int, place: int, done: int) -> None:
    """Let the disk begin with what is written, 64 MiB at a time, while the next piece is copied.

    The advice drops clean pages from the cache, too; what was just written is dirty, and is only sent off.
    """
    first, last = place // _STEP, (place + done) // _STEP
    if last > first and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(target, first * _STEP, (last - first) * _STEP, os.POSIX_FADV_DONTNEED)


def _write_all(target: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
