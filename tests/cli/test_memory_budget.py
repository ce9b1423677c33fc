"""``--max-memory`` makes batches smaller before it refuses, and what a refusal asks for is enough."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic import Geometry, make_checkpoint
from moesurgeon.engine import budget
from moesurgeon.engine.scratch import BATCH_TOKENS
from tests.cli.invoke import refused, succeeded

MIXTRAL, DEEPSEEK = "builtin:tiny-mixtral", "builtin:tiny-deepseek"
TEXT = ("-t", "builtin:json", "--max-tokens", "4096", "--length", "64", "--device", "cpu")
HEAL = ("builtin:json", "--heal-tokens", "2048", "--heal-heldout", "1024", "--device", "cpu")
COMMANDS: dict[str, Callable[[object, Path], list[object]]] = {
    "evaluate": lambda source, _out: ["evaluate", source, "--against", source, *TEXT],
    "continued": lambda source, _out: ["evaluate", source, *TEXT, "--continuations", "2", "--new-tokens", "8"],
    "profile": lambda source, out: ["profile", source, "-o", out, *TEXT, "--inner", "256"],
    "ridge": lambda source, out: ["retop", source, out, "--calibrate", *HEAL, "--heal-method", "ridge", "--allow-noop"],
    "distill": lambda source, out: ["retop", source, out, "--calibrate", *HEAL, "--heal-steps", "2", "--allow-noop"],
    "sample": lambda source, out: ["sample", source, "-o", out.with_suffix(".jsonl"), "--max-tokens", "64"],
}  # fmt: skip


@pytest.fixture
def nothing_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter counts for nothing: it has more than these checkpoints."""
    monkeypatch.setattr(budget, "taken_bytes", lambda *_given: 0)


@pytest.mark.parametrize(
    ("command", "source"),
    [*((command, MIXTRAL) for command in COMMANDS), *((command, DEEPSEEK) for command in ("profile", "distill"))],
)
@pytest.mark.usefixtures("nothing_taken")
def test_what_a_refusal_asks_for_is_enough(command: str, source: str, tmp_path: Path) -> None:
    arguments = COMMANDS[command](source, tmp_path / "out")
    message = refused(2, *arguments, "--max-memory", "1MB", says=("--max-memory is 1MB",))
    figure = _asked(message)
    assert not list(tmp_path.iterdir())
    memory = _memory(succeeded(*arguments, "--max-memory", figure, "--json").json)
    assert memory is None or memory["estimate"] <= memory["limit"]


@pytest.mark.usefixtures("nothing_taken")
def test_a_synthetic_checkpoint_runs_with_what_is_asked_for(tmp_path: Path) -> None:
    """Ten layers; its random weights know no text, and have a tokenizer only to read some."""
    source = _readable(tmp_path / "source", 20_000_000)
    command = ["profile", source, "-o", tmp_path / "profile", *TEXT]
    figure = _asked(refused(2, *command, "--max-memory", "1MB", says=("this needs",)))
    report = succeeded(*command, "--max-memory", figure, "--json").json
    assert not report["resident"]
    assert report["memory"]["estimate"] <= report["memory"]["limit"]


def test_the_interpreter_is_counted(tmp_path: Path) -> None:
    """As it is: what is asked for is of the whole process."""
    command = ["evaluate", MIXTRAL, *TEXT]
    figure = _asked(refused(2, *command, "--max-memory", "100MB", says=("this needs",)))
    succeeded(*command, "--max-memory", figure, "--json")


@pytest.mark.usefixtures("nothing_taken")
@pytest.mark.parametrize("source", [MIXTRAL, DEEPSEEK])
def test_smaller_batches_give_the_same_figures(source: str) -> None:
    command = ["evaluate", source, "--against", source, *TEXT, "--json"]
    whole = succeeded(*command, "--max-memory", "10GB").json
    assert whole["memory"]["batch_tokens"] <= BATCH_TOKENS and not whole["memory"]["shrunk"] and whole["resident"]
    seen = set()
    for limit in ("40MB", "15MB"):
        report = succeeded(*command, "--max-memory", limit).json
        assert report["memory"]["shrunk"] and report["memory"]["estimate"] <= report["memory"]["limit"]
        seen.add(report["memory"]["batch_tokens"])
        assert report["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert report["against"]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert report["domains"]["json"]["interval"] == pytest.approx(whole["domains"]["json"]["interval"], rel=1e-5)
    assert len(seen) > 1


@pytest.mark.usefixtures("nothing_taken")
def test_what_was_made_smaller_is_said() -> None:
    said = succeeded("evaluate", MIXTRAL, *TEXT, "--max-memory", "15MB").err
    assert re.search(r"note: to fit into --max-memory 15MB: batches of [\d,]+ tokens, logits of [\d,]+ positions", said)
    assert "note" not in succeeded("evaluate", MIXTRAL, *TEXT, "--max-memory", "10GB").err


def _asked(message: str) -> str:
    found = re.search(r"give at least ([\d.]+[GM]B)", message)
    assert found, message
    return found[1]


def _memory(report: dict[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] | None = report.get("memory") or report.get("healed", {}).get("memory")
    return found


def _readable(folder: Path, nbytes: int) -> Path:
    """Make a synthetic checkpoint with the tokenizer of a tiny one."""

    from moesurgeon.pipeline.subject import open_subject

    tiny = open_subject(MIXTRAL)
    vocabulary = tiny.anatomy.config["vocab_size"]
    make_checkpoint(folder, nbytes, geometry=Geometry(hidden=64, width=224, vocabulary=vocabulary))
    for path in tiny.root.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
