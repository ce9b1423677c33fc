"""The only place that knows about terminals: results, progress, errors, exit codes.

Results go to stdout, everything else to stderr. ``--json`` prints one object and no bars. Of several processes of one
run the first prints the results; the others say only what went wrong with them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from moesurgeon import launched
from moesurgeon.cli.streams import discard, say, unprinted
from moesurgeon.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PIPE,
    GateFailed,
    MoeSurgeonError,
    OutputError,
)
from moesurgeon.progress import SILENT, Advance, Progress

SCHEMA = 1

Report = dict[str, Any]


def answering(as_json: bool, work: Callable[[], None]) -> int:
    """Do ``work``, say what goes wrong with it in one line, and return the exit code."""
    try:
        try:
            work()
            sys.stdout.flush()
            return EXIT_OK
        except typer.Exit as end:
            sys.stdout.flush()
            return end.exit_code
        except KeyboardInterrupt as error:  # says more where finished shards wait for the next run
            message = str(error) or "interrupted; nothing that looks finished was left behind"
            return _failed(as_json, message, EXIT_INTERRUPTED)
        except MoeSurgeonError as error:
            if os.environ.get("MOESURGEON_DEBUG"):
                traceback.print_exc()
            return _failed(as_json, " ".join(str(error).split()), error.exit_code)
        except BrokenPipeError:
            raise
        except OSError as error:  # of the help or the version; commands explain their own
            discard(sys.stdout)
            return _failed(False, str(unprinted(error)), OutputError.exit_code)
        except Exception as error:  # noqa: BLE001 - the end of the line: shown as the bug that it is
            return _bug(as_json, error)
    except BrokenPipeError:  # the reader had enough, as in "| head"
        discard(sys.stdout, sys.stderr)
        return EXIT_PIPE


def answer(as_json: bool, work: Callable[[Progress], Report], show: Callable[[Report], None]) -> None:
    """Do ``work`` and print its report, as JSON or through ``show``; raises what goes wrong, and Exit where a gate of
    the report failed."""
    report = work(SILENT if as_json or launched.rank() else Bars())
    failed = _failed_gate(report)
    try:
        _print(report, None if as_json else show)
    except OSError as error:
        discard(sys.stdout)
        if not failed and isinstance(error, BrokenPipeError):
            raise
        unsaid = f"{unprinted(error)}; the work itself is done"
        if not failed:
            raise OutputError(unsaid) from error
        failed = f"{failed}; {unsaid}"
    if failed:  # said, but the report is the result all the same
        if not launched.rank():
            say(f"moesurgeon: {failed}")
        raise typer.Exit(GateFailed.exit_code)


def _print(report: Report, show: Callable[[Report], None] | None) -> None:
    if launched.rank():  # the first process of a run speaks for all
        return
    if show is None:
        # ASCII: a path can hold bytes that no encoding of the terminal's has.
        print(json.dumps({"schema_version": SCHEMA, **report}, allow_nan=False))
    else:
        show(report)
    sys.stdout.flush()


def _failed_gate(report: Report) -> str | None:
    """Return what to say of a report with a gate that did not hold."""
    gate = report.get("gate")
    if gate is None or gate["passed"]:
        return None
    from moesurgeon.evaluation.gate import failure

    return failure(gate)


def _failed(as_json: bool, message: str, code: int) -> int:
    """Say ``message`` on stderr, with ``as_json`` also as an object on stdout, and return ``code``."""
    others = f"[process {launched.rank()}] " if launched.rank() else ""
    say(f"{others}moesurgeon: {message}")
    if as_json and not others:
        try:
            print(json.dumps({"schema_version": SCHEMA, "error": {"message": message, "exit_code": code}}), flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            discard(sys.stdout)
    return code


def _bug(as_json: bool, error: Exception) -> int:
    traceback.print_exception(error)
    return _failed(as_json, f"bug in moesurgeon ({type(error).__name__}): please report the lines above", EXIT_BUG)


class Bars:
    """Progress as rich bars on stderr; where stderr is no terminal only the notes."""

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Advance]:
        if not sys.stderr.isatty():
            yield lambda done: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(label, total=total, rate="")

            def advance(done: float) -> None:
                bars.advance(task, done)
                speed = bars.tasks[task].speed
                bars.update(task, rate=rate(speed, unit) if speed else "")

            yield advance

    def note(self, message: str) -> None:
        say(message)


def rate(speed: float, unit: str) -> str:
    """Return a rate for people.

    >>> rate(2_500_000, "bytes")
    '2.5 MB/s'
    >>> rate(1234, "tokens")
    '1,234 tokens/s'
    """
    return f"{size(speed)}/s" if unit == "bytes" else f"{speed:,.0f} {unit}/s"


def size(count: float) -> str:
    """Return a number of bytes for people, in powers of 1000.

    >>> size(93_000_000_000)
    '93.0 GB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def amount(count: float) -> str:
    """Return a count for people.

    >>> amount(46_700_000_000), amount(3_478_656), amount(812)
    ('46.7 G', '3.48 M', '812')
    """
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}"


def facts(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a title and aligned name-value lines."""
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def table(headings: list[str], rows: list[list[str]], title: str | None = None, left: tuple[str, ...] = ()) -> None:
    """Print a table; the first column and those named in ``left`` to the left, numbers to the right.

    On a terminal that is too narrow, columns that do not fit follow below, with the first column again: no cell is cut.
    """
    if title:
        print(title)
    for columns in _blocks(headings, rows, _terminal_width()):
        print(_drawn(columns, headings, rows, left), end="")


def _terminal_width() -> int | None:
    """Return the columns of the terminal; None for redirected output, which has no width of its own."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() else None


def _blocks(headings: list[str], rows: list[list[str]], width: int | None) -> list[list[int]]:
    """Return the numbers of the columns of each table that ``width`` divides this one into.

    >>> _blocks(["name", "first", "second"], [["all", "1.000", "2.000"]], 16)
    [[0, 1], [0, 2]]
    """
    from rich.cells import cell_len

    each = [max(cell_len(row[number]) for row in [headings, *rows]) + 3 for number in range(len(headings))]
    blocks, taken = [[0]], each[0]
    for number in range(1, len(headings)):
        if width is not None and taken + each[number] > width and len(blocks[-1]) > 1:
            blocks.append([0])
            taken = each[0]
        blocks[-1].append(number)
        taken += each[number]
    return blocks


def _drawn(columns: list[int], headings: list[str], rows: list[list[str]], left: tuple[str, ...]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number in columns:
        is_left = number == 0 or headings[number] in left
        grid.add_column(headings[number], justify="left" if is_left else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(row[number] for number in columns))
    console = Console(width=10_000)
    with console.capture() as drawn:  # printed by rich, it would end the process where the reader went away
        console.print(grid)
    return drawn.get()


def bar(shares: list[float]) -> str:
    """Return one block character per expert, full height for the busiest of the layer.

    Of more than 64 experts neighbours share a character, which shows the busiest of them.
    """
    together = -(-len(shares) // 64)
    shares = [max(shares[first : first + together]) for first in range(0, len(shares), together)]
    blocks = "▁▂▃▄▅▆▇█"
    top = max(shares) or 1.0
    return "".join(blocks[min(7, int(share / top * 7.999))] if share else " " for share in shares)


def interval(bounds: Sequence[float | None], digits: int) -> str:
    """Return an interval for people; a question mark where one document leaves it unknown."""
    low, high = bounds
    return "?" if low is None or high is None else f"{low:.{digits}f} - {high:.{digits}f}"


def between(bounds: list[float | None]) -> str:
    """Return an interval of shares for people; a question mark where there are too few documents to tell."""
    return "?" if bounds[0] is None or bounds[1] is None else f"{bounds[0]:.3%} - {bounds[1]:.3%}"
