"""Ctrl-C and kill in the middle of the work leave nothing that looks finished."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from moesurgeon.errors import EXIT_INTERRUPTED
from tests.cli.invoke import contents, process, succeeded

MIXTRAL = "builtin:tiny-mixtral"
LONG = ("-t", "builtin:arithmetic", "--length", "64")


def _interrupt(arguments: tuple[str | Path, ...], during: bytes, sign: signal.Signals) -> tuple[int, bytes, bytes]:
    """Start a command, send ``sign`` once its bar says ``during``, and return exit code and both streams."""
    mine, theirs = pty.openpty()
    running = process(*arguments, stdout=subprocess.PIPE, stderr=theirs, env={"TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    seen, sent, deadline = b"", False, time.monotonic() + 90
    try:
        while time.monotonic() < deadline:
            if not select.select([mine], [], [], 1.0)[0]:
                continue
            try:
                piece = os.read(mine, 4096)
            except OSError:  # the other end is closed
                break
            seen += piece
            if during in seen and not sent:
                running.send_signal(sign)
                sent = True
        out, _ = running.communicate(timeout=30)
    finally:
        running.kill()
        os.close(mine)
    assert sent, seen
    return running.returncode, out, seen


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "top1"
    succeeded("retop", MIXTRAL, folder)
    return folder


def _commands(student: Path, folder: Path) -> dict[str, tuple[tuple[str | Path, ...], bytes]]:
    recover = ("recover", student, folder / "out", "--teacher", MIXTRAL, *LONG, "--max-tokens", "512")
    steps = ("--heldout-tokens", "64", "--steps", "1000000", "--judge-every", "1000000", "--tokens-per-step", "64")
    profile = ("profile", MIXTRAL, "-o", folder / "out", *LONG, "--max-tokens", "1000000")
    return {"recover": ((*recover, *steps), b"recovering"), "profile": (profile, b"profiling")}


@pytest.mark.parametrize("command", ["recover", "profile"])
def test_ctrl_c(command: str, tmp_path: Path, student: Path) -> None:
    arguments, during = _commands(student, tmp_path)[command]
    code, out, err = _interrupt((*arguments, "--overwrite"), during, signal.SIGINT)
    assert code == EXIT_INTERRUPTED
    assert out == b""
    plain = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", err).replace(b"\r", b"\n")
    assert b"Traceback" not in plain
    said = [line for line in plain.split(b"\n") if b"moesurgeon" in line]
    assert said == [b"moesurgeon: interrupted; nothing that looks finished was left behind"]
    assert contents(tmp_path) == {}  # no output, no staging folder, no lock


def test_kill(tmp_path: Path, student: Path) -> None:
    arguments, during = _commands(student, tmp_path)["recover"]
    code, out, _err = _interrupt(arguments, during, signal.SIGTERM)
    assert code == -signal.SIGTERM
    assert out == b""
    assert contents(tmp_path) == {}


def test_ctrl_c_of_a_run(tmp_path: Path) -> None:
    """What was done stays, but there are no figures, and another run may take the folder."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"checkpoint: {MIXTRAL}\ntext: {{traces: ['builtin:arithmetic'], length: 64}}\nreport_tokens: 64\n"
        "steps: [{retop: {}}, {recover: {schedule: {steps: 1000000, judge_every: 1000000, tokens_per_step: 64},"
        " max_tokens: 512, heldout_tokens: 64}}]\n"
    )
    code, _out, _err = _interrupt(("run", recipe, "-o", tmp_path / "run"), b"recovering", signal.SIGINT)
    assert code == EXIT_INTERRUPTED
    left = contents(tmp_path / "run")
    assert "figures.json" not in left and not any(name.startswith("checkpoint") for name in left)
    assert (tmp_path / "run" / "journal.jsonl").read_text().count("\n") == 2
    succeeded("verify", tmp_path / "run" / "stages" / "01-retop", "--source", MIXTRAL)
