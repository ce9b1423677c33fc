"""Standard streams that are closed, full, or have lost their reader.

The work is what counts: where a stream cannot take what is said, the exit code still tells how the work ended.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

from moesurgeon.errors import OutputError


def prepare() -> None:
    """Put something in the place of standard streams that were closed (``>&-``), as cron and daemons do.

    Otherwise the next file to be opened gets their number, and what is printed goes into it. Input ends at once, and
    what is said on stderr goes nowhere. Results have to go somewhere: writing to stdout fails, as on a full disk.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free: this one
    streams: dict[str, TextIO | None] = {"stdout": sys.stdout, "stderr": sys.stderr}
    for number, (name, stream) in enumerate(streams.items(), start=1):
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w", errors="replace", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character of the bars gets a "?"


def say(line: str) -> None:
    """Print a line on stderr, if that can take it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        discard(sys.stderr)


def unprinted(error: OSError) -> OutputError:
    """Return what to say where stdout could not take the result."""
    what = "stdout is closed" if error.errno == errno.EBADF else os.strerror(error.errno or 0)
    return OutputError(f"the result could not be printed ({what})")


def discard(*streams: TextIO) -> None:
    """Send what is still buffered nowhere, or the interpreter's own flush at the end fails again."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
