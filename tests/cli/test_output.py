"""The one place that knows terminals: what goes where, and what the exit code is."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from moesurgeon.cli import output
from moesurgeon.cli.output import Bars, bar, table
from moesurgeon.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_PIPE
from tests.cli.invoke import Outcome, finished, moesurgeon, one_line, process

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
        assert outcome.code == EXIT_PIPE
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("prune", "--help")], ids=" ".join)
def test_help_on_a_disk_that_is_full(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        outcome = finished(*arguments, stdout=full)
    assert outcome.code == 5 and one_line(outcome, 5, "could not be printed (No space left on device)")


def _shell(line: str, *arguments: str | Path) -> Outcome:
    """Run ``line`` with the command line as "$@" in a shell, which can close streams."""
    whole = [sys.executable, "-m", "moesurgeon", *map(str, arguments)]
    done = subprocess.run(["sh", "-c", line, "sh", *whole], capture_output=True, text=True, check=False, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_closed_stdout(tmp_path: Path) -> None:
    """As on a full disk: the work is done, and no file that is opened next takes what was to be printed."""
    outcome = _shell('"$@" >&-', "retop", INSPECT[1], tmp_path / "out")
    one_line(outcome, 5, "the result could not be printed (stdout is closed); the work itself is done")
    assert (tmp_path / "out" / "config.json").is_file()
    assert _shell('"$@" >&-', "inspect", "nowhere", "--json").code == 3
    one_line(_shell('"$@" >&-', "--help"), 5, "stdout is closed")


@pytest.mark.parametrize("how", ["2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_stderr(how: str, tmp_path: Path) -> None:
    """The exit code is all that is left, and it is right; notes of the work stop nothing."""
    assert _shell(f'"$@" {how}', "inspect", "nowhere").code == 3
    assert _shell(f'"$@" {how}', "frobnicate").code == 2
    written = _shell(f'"$@" {how}', "retop", INSPECT[1], tmp_path / "out")
    assert written.code == (5 if ">&- 2" in how else 0)
    assert (tmp_path / "out" / "config.json").is_file() and written.err == ""


@pytest.mark.parametrize("how", [">&-", ">/dev/full"])
def test_failed_gate_keeps_its_code(how: str) -> None:
    gate = ("-t", "builtin:json", "--max-tokens", "256", "--length", "64", "--gate", "perplexity < 1")
    outcome = _shell(f'"$@" {how}', "evaluate", INSPECT[1], *gate)
    one_line(outcome, 4, "perplexity", "could not be printed", "the work itself is done")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", INSPECT[1], "--bogus"],
        ["inspect"],
        ["retop", INSPECT[1], "out", "--top-k", "0"],
        ["prune", INSPECT[1], "out", "--keep", "abc"],
        ["recover", INSPECT[1], "out", "--objective", "hope"],
        ["frobnicate"],
        ["run", "recipe.yaml"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_one_object(arguments: list[str]) -> None:
    message = one_line(moesurgeon(*arguments), 2, "see moesurgeon", "--help")
    for spoken in (moesurgeon(*arguments, "--json"), moesurgeon("--json", *arguments)):
        assert spoken.json["error"]["exit_code"] == 2 and spoken.err.count("\n") == 1
    assert moesurgeon(*arguments, "--json").json["error"]["message"] == message


def test_tables_do_not_end_the_process(tmp_path: Path) -> None:
    """Rich ends a process with 1 where the reader of a table is gone."""
    script = "import os\nfrom moesurgeon.cli.output import table\ntable(['a'], [['b']] * 9)"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, check=False, timeout=120
        )
    finally:
        os.close(writing)
    assert b"BrokenPipeError" in done.stderr  # for the caller to see


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


@pytest.mark.parametrize("width", [1, 40, 60, 80, 130])
def test_no_cell_is_cut_on_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "_terminal_width", lambda: width)
    headings = [f"heading {number}" for number in range(9)]
    table(["domain", *headings], [["code", *(f"{number}.234 - 5.678" for number in range(9))], ["all", *"abcdefghi"]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= max(width, len("domain") + len("0.234 - 5.678") + 6)
    rows = {name: [line for line in lines if line.lstrip().startswith(name)] for name in ("domain", "code", "all")}
    assert len({len(found) for found in rows.values()}) == 1  # every block has every row, with its name
    for number, heading in enumerate(headings):
        assert "".join(rows["domain"]).count(heading) == 1
        assert "".join(rows["code"]).count(f"{number}.234 - 5.678") == 1
