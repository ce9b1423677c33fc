"""What ``evaluate`` says beside losses: gates with their exit codes, positions, degeneration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.engine import budget
from tests.cli.conftest import TEXT
from tests.cli.invoke import finished, moesurgeon, refused, succeeded
from tests.conftest import BUILTIN

MIXTRAL = BUILTIN[0]
CONTINUE = ("--continuations", "5", "--new-tokens", "16")


@pytest.fixture
def evaluate(top1: dict[str, Path]) -> Callable[..., tuple[str | Path, ...]]:
    """The arguments of a comparison."""
    return lambda *more: ("evaluate", top1[MIXTRAL], "--against", MIXTRAL, *TEXT, *more)


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.evaluate.held_out_text", pytest.fail)


def test_gate_that_passes(evaluate: Callable[..., Any]) -> None:
    gates = ("--gate", "perplexity_ratio < 2 and domains.js.perplexity_ratio < 2", "--gate", "kl < 1 or loss < 0")
    report = succeeded(*evaluate(*gates, "--json")).json
    assert report["gate"]["passed"] is True
    assert report["gate"]["expression"] == f"({gates[1]}) and ({gates[3]})"
    assert report["gate"]["values"] == {
        "perplexity_ratio": report["against"]["perplexity_ratio"],
        "domains.js.perplexity_ratio": report["against"]["domains"]["js"]["perplexity_ratio"],
        "kl": report["against"]["kl"],
        "loss": report["loss"],
    }
    assert f"gate passed: {report['gate']['expression']}" in succeeded(*evaluate(*gates)).out


def test_gate_that_fails_shows_its_report_all_the_same(evaluate: Callable[..., Any]) -> None:
    gates = ("--gate", "perplexity_ratio <= 1.0 and kl < 1")
    shown = moesurgeon(*evaluate(*gates))
    assert shown.code == 4
    assert "perplexity" in shown.out and "gate failed: perplexity_ratio <= 1.0 and kl < 1" in shown.out
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("moesurgeon: gate failed: perplexity_ratio <= 1.0 (perplexity_ratio is 1.")
    spoken = moesurgeon(*evaluate(*gates, "--json"))
    assert spoken.code == 4 and spoken.err == shown.err
    assert spoken.json["gate"]["passed"] is False and spoken.json["perplexity"] > 1
    assert spoken.json["gate"]["conditions"] == [
        {"expression": "perplexity_ratio <= 1.0", "passed": False},
        {"expression": "kl < 1", "passed": True},
    ]


def test_exit_code_of_a_gate_as_a_process() -> None:
    outcome = finished("evaluate", MIXTRAL, *TEXT, "--gate", "perplexity < 1", "--json")
    assert outcome.code == 4 and outcome.json["gate"]["passed"] is False
    assert outcome.err.startswith("moesurgeon: gate failed: perplexity < 1 (perplexity is ")


@pytest.mark.usefixtures("no_walk")
@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("perplexity <", ("cannot be read", "write it as")),
        ("perplexity", ("is a number", "compare it")),
        ("open('x') < 1", ("not possible",)),
        ("perplexty < 5", ("there is no perplexty", "did you mean perplexity?")),
        ("domains.python.loss < 5", ("domains has arithmetic, js",)),
        ('lengths["128-255"].loss < 5', ('there is no lengths["128-255"].loss', 'lengths has ["0-127"]')),
        ("perplexity_ratio < 1.1", ("perplexity_ratio needs --against CKPT",)),
        ("against.kl < 1", ("against.kl needs --against CKPT",)),
        ("domains.js.kl < 1", ("domains.js.kl needs --against CKPT",)),
        ("degeneration.loops < 1", ("degeneration.loops needs --continuations N",)),
        ("against.degeneration.loops < 1", ("needs --against CKPT and --continuations N",)),
        ("splits < 1", ("there is no splits",)),
        ("checkpoint == 1", ("there is no checkpoint",)),
    ],
)
def test_gate_that_cannot_be_judged_is_refused_before_the_walk(gate: str, says: tuple[str, ...]) -> None:
    refused(2, "evaluate", MIXTRAL, *TEXT, "--gate", gate, says=("gate", *says))


def test_figure_that_turns_out_missing(tmp_path: Path) -> None:
    """The windows may be longer than any document."""
    (tmp_path / "short.txt").write_text("A short text, and nothing behind it.\n")
    command = ("evaluate", MIXTRAL, "-t", tmp_path / "short.txt", "--length", "512")
    refused(2, *command, "--gate", 'lengths["256-511"].loss < 9', says=('lengths has ["0-127"]',))


@pytest.fixture
def one_document(tmp_path: Path) -> Path:
    """Text of one document in several windows."""
    path = tmp_path / "one.txt"
    path.write_text(" ".join(str(number * number) for number in range(200)))
    return path


@pytest.mark.usefixtures("no_measure")
@pytest.mark.parametrize(
    "gate",
    ["interval[1] < 1e9", "against.domains.one.interval[0] > 0", 'kl < 9 and lengths["0-127"].ratio_interval[1] < 9'],
)
def test_a_gate_on_an_interval_of_one_document_is_refused_before_the_walk(gate: str, one_document: Path) -> None:
    command = ("evaluate", MIXTRAL, "--against", MIXTRAL, "-t", one_document, "--length", "64")
    refused(2, *command, "--gate", gate, says=(gate.rsplit(" and ", maxsplit=1)[-1], "one document gives no interval"))


@pytest.fixture
def no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.evaluate.measure", pytest.fail)


def test_one_document_has_no_interval(one_document: Path, top1: dict[str, Path]) -> None:
    command = ("evaluate", top1[MIXTRAL], "--against", MIXTRAL, "-t", one_document, "--length", "64")
    report = succeeded(*command, "--gate", "perplexity_ratio > 0", "--json").json
    assert report["documents"] == 1 and report["gate"]["passed"]
    parts = [report, report["domains"]["one"], report["against"], report["against"]["domains"]["one"]]
    parts += report["lengths"].values()
    assert [part["interval"] for part in parts] == [[None, None]] * len(parts)
    assert all(part["ratio_interval"] == [None, None] for part in report["lengths"].values())
    rows = [line.split() for line in succeeded(*command).out.splitlines()]
    assert [row.count("?") for row in rows if row and row[0] in ("one", "all", "0-127")] == [2, 2, 2]


def test_lengths_have_ratios_and_intervals(evaluate: Callable[..., Any]) -> None:
    report = succeeded(*evaluate("--json")).json
    (bucket,) = report["lengths"].values()
    assert bucket["documents"] == report["documents"]
    assert bucket["interval"] == report["interval"]  # all positions are in it
    assert bucket["perplexity_ratio"] == pytest.approx(report["against"]["perplexity_ratio"])
    assert bucket["ratio_interval"] == pytest.approx(report["against"]["interval"])
    assert "By position in the window" in succeeded(*evaluate()).out


def test_continuations(evaluate: Callable[..., Any]) -> None:
    report = succeeded(*evaluate(*CONTINUE, "--gate", "degeneration.repetition_rate <= 1", "--json")).json
    names = {"repetition_rate", "distinct_1", "distinct_2", "distinct_4", "loops", "first_loop_at", "early_stop"}
    for made in (report["degeneration"], report["against"]["degeneration"]):
        assert (made["prompts"], made["new_tokens"]) == (5, 16)
        assert {name: part["prompts"] for name, part in made["domains"].items()} == {"arithmetic": 3, "js": 2}
        for part in (made, *made["domains"].values()):
            assert names <= set(part)
            assert all(0 <= part[name] <= 1 for name in names - {"first_loop_at"})
    assert report["degeneration"] != report["against"]["degeneration"]
    assert report["gate"]["passed"] is True
    assert succeeded(*evaluate(*CONTINUE, "--json")).json["degeneration"] == report["degeneration"]
    shown = succeeded(*evaluate(*CONTINUE)).out
    assert "Greedy continuations, 16 tokens (the other checkpoint's)" in shown
    for heading in ("prompts", "repetition rate", "distinct 4", "loops", "first loop at", "early stop"):
        assert heading in shown
    alone = succeeded("evaluate", evaluate()[1], *TEXT, *CONTINUE, "--json").json
    assert alone["degeneration"] == report["degeneration"]


def test_continuations_change_no_other_figure(evaluate: Callable[..., Any]) -> None:
    with_, without = (succeeded(*evaluate(*more, "--json")).json for more in (CONTINUE, ()))
    assert with_["loss"] == without["loss"] and with_["lengths"] == without["lengths"]


def test_continuations_need_the_checkpoint_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches get smaller before that is refused, and the refusal says how much would do."""
    monkeypatch.setattr(budget, "taken_bytes", lambda *_given: 0)
    limit = ("--max-memory", "30MB")
    assert succeeded("evaluate", MIXTRAL, *TEXT, "--json", "--max-memory", "10MB").json["resident"] is False
    assert succeeded("evaluate", MIXTRAL, *TEXT, *CONTINUE, "--json", *limit).json["resident"] is True
    monkeypatch.setattr("moesurgeon.pipeline.evaluate.measure", pytest.fail)
    says = ("--continuations needs the checkpoint in memory", "--max-memory is 10MB: give at least")
    refused(2, "evaluate", MIXTRAL, *TEXT, *CONTINUE, "--max-memory", "10MB", says=says)


def test_continuations_have_to_fit_into_the_context() -> None:
    command = ("evaluate", MIXTRAL, *TEXT, "--continuations", "2", "--new-tokens")
    refused(2, *command, "481", says=("--new-tokens 481 does not fit", "a prompt of 32", "at most 480"))
    refused(2, *command, "0", says=("--new-tokens",))
