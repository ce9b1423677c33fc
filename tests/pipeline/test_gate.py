"""A recipe with a gate: judged on the result, refused before anything runs if it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesurgeon.pipeline import run as module
from moesurgeon.pipeline.verify import verify
from tests.cli.invoke import moesurgeon, refused

RECIPE = """
checkpoint: builtin:tiny-mixtral
text: {{traces: ['builtin:json'], length: 64}}
report_tokens: 256
gate: >
  perplexity_ratio < {most}
  and domains.json.kl < 9
steps:
  - retop:
  - profile: {{max_tokens: 256}}
"""


@pytest.mark.parametrize("passes", [True, False])
def test_gate_of_a_recipe(passes: bool, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENTROPY_TOKENS", 256)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(most=9 if passes else 0.5))
    outcome = moesurgeon("run", recipe, "-o", out, "--json")
    assert outcome.code == (0 if passes else 4)
    gate = outcome.json["gate"]
    assert gate["passed"] is passes and set(gate["values"]) == {"perplexity_ratio", "domains.json.kl"}
    assert json.loads((out / "figures.json").read_text())["gate"] == gate
    assert (out / "checkpoint").exists() is passes and (out / "rejected").exists() is not passes
    verify(str(out / ("checkpoint" if passes else "rejected")), "builtin:tiny-mixtral")
    if not passes:
        assert outcome.json["checkpoint"] == "builtin:tiny-mixtral" and outcome.json["accepted"] == "original"
        assert outcome.json["rejected"] == str(out / "rejected")
    assert outcome.err == "" if passes else "gate failed: perplexity_ratio < 0.5 (" in outcome.err


@pytest.mark.parametrize(
    ("gate", "code", "says"),
    [
        ("perplexity_ratio <", 2, "cannot be read"),
        ("domains.python.loss < 1", 2, "domains has json"),
        ("degeneration.loops < 1", 2, "needs --continuations N"),
        ("5", 3, "gate must be text"),
    ],
)
def test_gate_that_cannot_be_judged(
    gate: str, code: int, says: str, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "evaluate", pytest.fail)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"checkpoint: builtin:tiny-mixtral\ntext: {{traces: ['builtin:json']}}\ngate: {gate}\n"
                      "steps: [{retop: {}}]\n")  # fmt: skip
    refused(code, "run", recipe, "-o", out, says=(says,))
    assert not out.exists()


def test_gate_without_a_result(tmp_path: Path, out: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("checkpoint: builtin:tiny-mixtral\ngate: loss < 9\nsteps: [{profile: {}}]\n")
    refused(3, "run", recipe, "-o", out, says=("gate judges what the steps made", "add a step"))
