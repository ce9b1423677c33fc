"""Running the command line: in this process where that will do, as a process where it will not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.testing

from moesurgeon.cli import app

RUNNER = typer.testing.CliRunner()


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        loaded = json.loads(lines[0])
        assert loaded["schema_version"] == 1
        return dict(loaded)


def moesurgeon(*arguments: str | Path) -> Outcome:
    """Run the command line in this process."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def succeeded(*arguments: str | Path) -> Outcome:
    """Run the command line in this process; it has to succeed, and to be quiet outside a terminal."""
    outcome = moesurgeon(*arguments)
    assert outcome.code == 0, outcome.err
    assert "\x1b" not in outcome.err and "━" not in outcome.err  # no bars
    if "--json" in map(str, arguments):
        assert outcome.err == ""
    return outcome


_AMOUNTS = ("calibration text: ", "validation text: ", "note: the validation text is too little to decide: ")


def without_amounts(said: str) -> list[str]:
    """Return the lines of ``said`` that are not of how much text heals and judges."""
    return [line for line in said.splitlines() if not line.startswith(_AMOUNTS)]


def refused(code: int, *arguments: str | Path, says: tuple[str, ...] = ()) -> str:
    """Run the command line in this process; it has to refuse with ``code`` and one line, which is returned.

    Also with ``--json``, where the same line is in the object on stdout.
    """
    outcome = moesurgeon(*arguments)
    message = one_line(outcome, code, *says)
    assert outcome.out == ""
    spoken = moesurgeon(*arguments, "--json")
    assert one_line(spoken, code) == message
    assert spoken.json == {"schema_version": 1, "error": {"message": message, "exit_code": code}}
    return message


def one_line(outcome: Outcome, code: int, *says: str) -> str:
    """Check that an outcome is an error in a single line with ``says`` in it, and return the line.

    How much text heals and judges may be said before it: that is said before the work begins.
    """
    assert outcome.code == code, f"exit code {outcome.code}: {outcome.err}"
    assert "Traceback" not in outcome.err
    lines = without_amounts(outcome.err)
    assert len(lines) == 1 and lines[0].startswith("moesurgeon: "), outcome.err
    message = lines[0].strip().removeprefix("moesurgeon: ")
    for part in says:
        assert part in message, f"{part!r} is not in {message!r}"
    return message


def process(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start the command line as a process of its own, offline and on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    command = [sys.executable, "-m", "moesurgeon", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, **options)


def finished(*arguments: str | Path, **options: Any) -> Outcome:
    """Run the command line as a process to its end."""
    running = process(*arguments, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
    out, err = running.communicate(timeout=120)
    return Outcome(running.returncode, (out or b"").decode(), (err or b"").decode())


def contents(folder: Path) -> dict[str, int]:
    """Everything below a folder, hidden files too, with sizes: to see that nothing was written."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}
