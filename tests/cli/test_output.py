"""The one place that knows terminals: what goes where, and what the exit code is."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from moesurgeon.cli.output import Bars, bar, table
from moesurgeon.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_PIPE
from tests.cli.invoke import finished, moesurgeon, process

INSPECT = ("inspect", "builtin:tiny-mixtral")


@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["human", "json"])
@pytest.mark.parametrize("command", [INSPECT, ("inspect", "nowhere"), ("--help",)], ids=" ".join)
def test_reader_that_went_away(command: tuple[str, ...], extra: list[str]) -> None:
    """``moesurgeon ... | true``, without the race: the reading end is closed before the start."""
    if command == ("--help",):
        extra = []
    reading, writing = os.pipe()
    os.close(reading)
    try:
        outcome = finished(*command, *extra, stdout=writing)
    finally:
        os.close(writing)
    assert "Traceback" not in outcome.err and "BrokenPipe" not in outcome.err
    if "nowhere" not in command:
        assert outcome.err == ""
        assert outcome.code in ((EXIT_PIPE,) if command == INSPECT else (EXIT_PIPE, 1))  # --help is typer's
    elif extra:
        assert outcome.code == EXIT_PIPE
    else:
        assert outcome.code == 3


def test_nobody_listens_at_all() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert finished("inspect", "nowhere", stdout=writing, stderr=writing).code == EXIT_PIPE
    finally:
        os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_disk_that_is_full() -> None:
    with Path("/dev/full").open("w") as full:
        outcome = finished(*INSPECT, stdout=full)
    assert outcome.code == 5
    assert outcome.err.startswith("moesurgeon: the result could not be printed") and outcome.err.count("\n") == 1


def test_terminal_that_lacks_characters(tmp_path: Path) -> None:
    """People see another character, scripts get the right one all the same."""
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    outcome = finished("inspect", tmp_path / "café", "--json", env=ascii_only)
    assert outcome.code == 3 and "café" in outcome.json["error"]["message"]
    script = (
        "import sys; from moesurgeon.cli import app, main; from moesurgeon.cli.output import bar\n"
        "app.command('bar')(lambda: print(bar([1.0, 0.5])))\n"
        "sys.argv = ['moesurgeon', 'bar']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **ascii_only}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"??\n", b"")


def test_path_that_is_no_text(tmp_path: Path) -> None:
    outcome = finished("inspect", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), "--json")
    assert outcome.code == 3 and outcome.json["error"]["exit_code"] == 3


def _fails(error: BaseException) -> object:
    def work(name: str) -> object:
        raise error

    return work


def test_bug_is_shown_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.inspect.inspect", _fails(ZeroDivisionError("oops")))
    outcome = moesurgeon(*INSPECT, "--json")
    assert outcome.code == EXIT_BUG
    assert "Traceback" in outcome.err and "oops" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("moesurgeon: bug in moesurgeon (ZeroDivisionError)")
    assert outcome.json["error"]["exit_code"] == EXIT_BUG


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.inspect.inspect", _fails(KeyboardInterrupt()))
    outcome = moesurgeon(*INSPECT, "--json")
    assert outcome.code == EXIT_INTERRUPTED
    assert outcome.err.startswith("moesurgeon: interrupted") and outcome.err.count("\n") == 1
    assert outcome.json["error"]["exit_code"] == EXIT_INTERRUPTED


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESURGEON_DEBUG", "1")
    outcome = moesurgeon("inspect", "nowhere")
    assert outcome.code == 3
    assert "Traceback" in outcome.err and outcome.err.splitlines()[-1].startswith("moesurgeon: nowhere does not exist")


def test_table_is_not_cut_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    headings = [f"heading-{number}" for number in range(20)]
    table(headings, [["x" * 30] * 20], "title")
    shown = capsys.readouterr().out
    assert shown.startswith("title\n") and "…" not in shown
    assert shown.count("x" * 30) == 20 and all(heading in shown for heading in headings)


def test_bars_are_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars().task("working", 10, "tokens") as advance:
        advance(10)
    Bars().note("a word")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "a word\n")


def test_bars_on_a_terminal(tmp_path: Path) -> None:
    """With a rate, and gone at the end; the result is on stdout alone."""
    mine, theirs = pty.openpty()
    text = ("-t", "builtin:json", "--max-tokens", "256", "--length", "64")
    running = process(
        "evaluate", "builtin:tiny-mixtral", *text, stdout=subprocess.PIPE, stderr=theirs, env={"TERM": "xterm"}
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(mine, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        seen += piece
    out, _ = running.communicate(timeout=60)
    os.close(mine)
    assert running.returncode == 0
    assert b"evaluating" in seen and b"100%" in seen
    assert b"\x1b" not in out and b"evaluating" not in out


def test_bar_of_shares() -> None:
    assert bar([0.5, 0.25, 0.0, 0.25]) == "█▄ ▄"
    assert bar([0.0, 0.0]) == "  "
