"""``prune --stages``, ``--gate`` and ``--search``: what is printed, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesurgeon.errors import GateFailed
from tests.cli.invoke import contents, moesurgeon, refused, succeeded

MIXTRAL = "builtin:tiny-mixtral"
HEAL = ("--heal", "builtin:json", "--heal-method", "none", "--heal-tokens", "1024", "--heal-heldout", "512")


def test_stages_as_a_table(out: Path) -> None:
    shown = succeeded("prune", MIXTRAL, out, "--stages", "25%:2", "--gate", "loss < 99", "--explain", *HEAL).out
    assert "8 -> 6 experts per layer, by reap" in shown
    assert "stage-02, in the numbering of the 7 experts before it:" in shown
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith("stage-0") and "->" in line]
    assert [row[:4] for row in rows] == [["stage-01", "8", "->", "7"], ["stage-02", "7", "->", "6"]]
    assert all(row[-1] == "accepted" for row in rows)
    assert (out / "config.json").is_file() and sorted(contents(out.parent)) and not list(out.parent.glob(".out*"))


def test_a_gate_that_fails_later_keeps_what_passed(out: Path) -> None:
    """Exit code 4, and the last good state is there."""
    arguments = ("prune", MIXTRAL, out, "--stages", "7,2", "--gate", "perplexity_ratio < 1.1", *HEAL)
    result = moesurgeon(*arguments)
    assert result.code == GateFailed.exit_code and "gate failed" in result.err and "rolled back" in result.out
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 7
    as_json = moesurgeon(*arguments, "--overwrite", "--json")
    assert as_json.code == GateFailed.exit_code and not as_json.json["gate"]["passed"]
    assert [stage["accepted"] for stage in as_json.json["stages"]] == [True, False]


def test_one_document_judges_without_an_interval(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure itself can be a gate; an end of its interval is refused before anything is profiled or healed."""
    heal = ("--heal", "builtin:json", "--heal-method", "none", "--heal-tokens", "512", "--heal-heldout", "64")
    command = ("prune", MIXTRAL, out, "--keep", "7", *heal)
    shown = succeeded(*command, "--gate", "perplexity_ratio < 99").out
    (row,) = (line.split() for line in shown.splitlines() if line.strip().startswith("stage-01") and "->" in line)
    assert row[-2:] == ["?", "accepted"]
    says = ("against.interval[1] < 9", "one document gives no interval")
    monkeypatch.setattr("moesurgeon.pipeline.stages._Stages", pytest.fail)
    refused(2, *command, "--overwrite", "--gate", "against.interval[1] < 9", says=says)
    refused(2, *command, "--overwrite", "--search", "--gate", "against.interval[1] < 9", says=says)
    recipe = tmp_path / "recipe.yaml"
    step = (
        "steps: [{prune: {keep: 7, gates: ['against.interval[1] < 9'], "
        "heal: {traces: ['builtin:json'], method: none, heldout_tokens: 64}}}]\n"
    )
    monkeypatch.setattr("moesurgeon.pipeline.run._measured", pytest.fail)
    recipe.write_text(f"checkpoint: {MIXTRAL}\n{step}")
    refused(2, "run", recipe, "-o", tmp_path / "run", says=says)
    recipe.write_text(
        f"checkpoint: {MIXTRAL}\ntext: {{traces: ['builtin:json']}}\nreport_tokens: 64\n"
        "gate: against.interval[1] < 9\nsteps: [{retop: {}}]\n"
    )
    refused(2, "run", recipe, "-o", tmp_path / "run", says=says)


def test_search(out: Path) -> None:
    arguments = ("prune", MIXTRAL, out, "--search", "--keep", "6", "--gate", "loss < 99", *HEAL)
    planned = succeeded(*arguments, "--dry-run").out
    assert "would be judged with 7, 6 experts" in planned and contents(out.parent) == {}
    assert "8 -> 6 experts per layer" in succeeded(*arguments).out


def test_what_cannot_be(out: Path) -> None:
    refused(2, "prune", MIXTRAL, out, "--stages", "seven", *HEAL, says=("'seven' is no number of experts",))
    refused(2, "prune", MIXTRAL, out, "--stages", "7", says=("--stages judges on text", "--heal"))
    refused(2, "prune", MIXTRAL, out, "--search", *HEAL, says=("add --gate",))
    failed = moesurgeon("prune", MIXTRAL, out, "--keep", "4", "--gate", "loss < 0", *HEAL)
    assert failed.code == GateFailed.exit_code and "nothing was written" in failed.err.splitlines()[-1]
    assert contents(out.parent) == {}
