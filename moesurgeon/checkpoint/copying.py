"""Appending byte ranges of one file to another, by the shortest way that the file systems allow.

``copy_file_range`` (which shares blocks on file systems that can), then ``sendfile``, then plain reads
and writes through a buffer. Nothing here waits for the disk, but everything makes it begin.
"""

from __future__ import annotations

import errno
import os

from moesurgeon.checkpoint.faults import FULL
from moesurgeon.checkpoint.header import BLOCK
from moesurgeon.errors import CheckpointError
from moesurgeon.progress import Advance

# "This pair of files cannot do that": try the next way. Anything else is a real error. For EIO the last way says
# which of the two cannot.
_REFUSALS = {errno.EIO, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
# Short enough for the progress bar to move, Ctrl-C to be heard and the disk to be busy; 64 MiB took 1.1 x as long.
_STEP = 16 << 20
# Stays in the cache of a core: with 2 MiB a copy took 1.3 x as long.
_BUFFERED = 1 << 20


class Appender:
    """Appends to the open file ``target``, telling ``advance``. For one thread."""

    def __init__(self, target: int, advance: Advance) -> None:
        self._target = target
        self._advance = advance
        self._buffer: memoryview | None = None  # made once: new memory for every range costs as much as the copy

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``, however little the kernel takes at once."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._target, view) :]

    def copy(self, source: int, offset: int, length: int, shard: str) -> None:
        """Append ``length`` bytes of the descriptor ``source``, which is ``shard``, from ``offset`` on.

        Where source and target lie alike within their blocks, whole blocks go inside the kernel, which may
        share them; the rest, and all of it elsewhere, through a buffer: ext4 moves misaligned ranges page by
        page, and measured 1.7 times slower to copy and twice as slow to flush.
        """
        shift = os.lseek(self._target, 0, os.SEEK_CUR) - offset
        in_kernel = (self._by_copy_file_range, self._by_sendfile, self._by_read_and_write)
        for start, stop, is_whole in _pieces(offset, offset + length, shift):
            for way in in_kernel if is_whole else in_kernel[-1:]:
                try:
                    while start < stop:
                        done = way(source, start, min(stop - start, _STEP))
                        if done == 0:
                            raise CheckpointError(
                                f"{shard} became shorter while it was read; leave it alone and try again"
                            )
                        self._begin_flush(start + shift, done)
                        start += done
                        self._advance(done)
                except OSError as error:
                    if error.errno not in _REFUSALS or way is in_kernel[-1]:
                        raise
                else:
                    break

    def _by_copy_file_range(self, source: int, offset: int, length: int) -> int:
        if not hasattr(os, "copy_file_range"):  # not on macOS
            raise OSError(errno.ENOSYS, "no copy_file_range")
        return os.copy_file_range(source, self._target, length, offset_src=offset)

    def _by_sendfile(self, source: int, offset: int, length: int) -> int:
        return os.sendfile(self._target, source, offset, length)

    def _by_read_and_write(self, source: int, offset: int, length: int) -> int:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_BUFFERED))
        try:
            done = os.preadv(source, [self._buffer[:length]], offset)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise CheckpointError(f"a shard cannot be read ({error.strerror}); copy it from elsewhere") from error
        self.write(self._buffer[:done])
        return done

    def _begin_flush(self, place: int, done: int) -> None:
        """Let the disk begin with what is written, a step at a time, while the next piece is copied.

        The advice drops clean pages from the cache, too; what was just written is dirty, and is only sent off.
        """
        first, last = place // _STEP, (place + done) // _STEP
        if last > first and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._target, first * _STEP, (last - first) * _STEP, os.POSIX_FADV_DONTNEED)


def _pieces(offset: int, end: int, shift: int) -> list[tuple[int, int, bool]]:
    """Return (start, stop, whether it is whole blocks on both sides): only those can be shared."""
    first, last = -(-offset // BLOCK) * BLOCK, end // BLOCK * BLOCK
    if shift % BLOCK or first >= last:
        return [(offset, end, False)]
    pieces = [(offset, first, False), (first, last, True), (last, end, False)]
    return [piece for piece in pieces if piece[0] < piece[1]]
