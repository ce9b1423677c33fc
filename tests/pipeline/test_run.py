"""``run``: figures, journal, the checkpoint at the end, and what a failure leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.cli.run import _show as show
from moesurgeon.pipeline import run as module
from moesurgeon.pipeline.bare import bare_plan
from moesurgeon.pipeline.evaluate import evaluate
from moesurgeon.pipeline.inspect import inspect
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recipe import Step
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.run import RunOutput, run
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.profiling.artefact import load_profile
from moesurgeon.surgery.retop import RetopSpec
from tests.conftest import BUILTIN

RECIPE = """
checkpoint: {checkpoint}
text: {{traces: ['builtin:arithmetic', 'js=builtin:json'], length: 64}}
report_tokens: 512
steps:
  - retop: {{heal: {{method: ridge, max_tokens: 2048, heldout_tokens: 1024}}}}
  - profile: {{max_tokens: 512}}
  - prune: {{ratio: 0.25}}
  - recover:
      schedule: {{steps: 3, tokens_per_step: 128, judge_every: 1, learning_rate: 0.0001}}
      max_tokens: 512
      heldout_tokens: 128
      allow_noop: true
"""
STAGES = ["original", "retop", "prune", "recover"]


@dataclass(frozen=True)
class Done:
    checkpoint: str
    folder: Path
    report: dict[str, Any]


@pytest.fixture(scope="session", params=BUILTIN, ids=["mixtral", "deepseek"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A whole run of a tiny recipe on each builtin checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(checkpoint=request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ENTROPY_TOKENS", 512)
        return Done(request.param, folder / "run", run(recipe, RunOutput(output=folder / "run")))


def test_figures(done: Done) -> None:
    figures = json.loads((done.folder / "figures.json").read_text())
    assert {"output": str(done.folder), **figures} == done.report
    assert [stage["stage"] for stage in figures["stages"]] == STAGES
    assert figures["seconds"] > 0 and figures["recipe"].endswith("recipe.yaml")
    for stage in figures["stages"]:
        assert set(stage["parameters"]) == {"total", "active", "experts"}
        assert set(stage["domains"]) == {"arithmetic", "js"}
        for field in ("flops_per_token", "bytes", "experts", "top_k", "loss", "perplexity", "max_over_mean",
                      "tokens_per_second"):  # fmt: skip
            assert stage[field] > 0, field
        assert 0 <= stage["utilization_entropy"] <= 1
        for low, high in (stage["interval"], stage["ratio_interval"]):
            assert 0 < low <= high
        assert stage["ratio_interval"][0] <= stage["perplexity_ratio"] <= stage["ratio_interval"][1]


def test_figures_are_those_of_the_stages(done: Done) -> None:
    original, retop, prune, recover = done.report["stages"]
    facts = inspect(done.checkpoint)
    assert (original["experts"], original["top_k"]) == (facts["experts"], facts["top_k"])
    assert original["parameters"] == retop["parameters"] | {"active": original["parameters"]["active"]}
    assert retop["top_k"] == prune["top_k"] == recover["top_k"] == 1
    assert prune["experts"] == recover["experts"] == facts["experts"] * 3 // 4
    assert retop["flops_per_token"] < original["flops_per_token"]
    assert prune["bytes"] < retop["bytes"] == original["bytes"] and prune["bytes"] == recover["bytes"]
    assert original["perplexity_ratio"] == 1.0
    assert original["gap_closed"] is prune["gap_closed"] is None and 0 < retop["gap_closed"] < 1
    for stage in (retop, prune, recover):
        assert stage["perplexity_ratio"] == pytest.approx(stage["perplexity"] / original["perplexity"])


def test_a_healed_step_shows_what_its_cut_cost_bare(done: Done, tmp_path: Path) -> None:
    """As if the cut had been written without healing and evaluated."""
    original, healed, *others = done.report["stages"]
    assert "bare" not in original and not any("bare" in stage for stage in others)
    text = Text(traces=("builtin:arithmetic", "js=builtin:json"), length=64, max_tokens=512, split="report")
    retop(done.checkpoint, RetopSpec(top_k=1), Writing(output=tmp_path / "bare"))
    wanted = evaluate(str(tmp_path / "bare"), done.checkpoint, text, Running())
    bare = healed["bare"]
    assert bare["loss"] == wanted["loss"] and bare["interval"] == wanted["interval"]
    assert bare["domains"] == {domain: figures["perplexity"] for domain, figures in wanted["domains"].items()}
    assert bare["perplexity_ratio"] == pytest.approx(wanted["against"]["perplexity_ratio"])
    assert bare["perplexity"] > healed["perplexity"]


def test_a_healed_prune_is_held_against_the_experts_that_it_kept(tiny: Subject) -> None:
    kept = {
        str(layer): list(range(tiny.anatomy.experts - 4, tiny.anatomy.experts)) for layer in tiny.anatomy.moe_layers
    }
    plan = bare_plan(tiny.anatomy, Step(prune=PruneSpec(keep=4)), {"kept": kept})
    maps = plan.record[0]["expert_map"]
    assert {layer: [int(old) for old in experts] for layer, experts in maps.items()} == kept


def test_journal(done: Done) -> None:
    lines = [json.loads(line) for line in (done.folder / "journal.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["original", "retop", "profile", "prune", "recover", "end"]
    staged = [line for line in lines if line["stage"] not in ("profile", "end")]
    # Where it lay until it was accepted.
    assert staged[-1].pop("checkpoint") == str(done.folder / "stages" / "04-recover")
    assert staged == [*done.report["stages"][:-1], _without(done.report["stages"][-1], "checkpoint")]
    assert lines[-1] == {"stage": "end", "checkpoint": str(done.folder / "checkpoint"), "accepted": "recover"}
    taken = load_profile(done.folder / lines[2]["profile"])
    # What calibrates is not what is reported on.
    assert set(taken.origin.splits.values()) == {"calibration"}
    assert taken.statistics.domains == ("arithmetic", "js")


def _without(stage: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key != name}


def test_checkpoint(done: Done) -> None:
    assert Path(done.report["checkpoint"]) == done.folder / "checkpoint"
    report = verify(done.report["checkpoint"], done.checkpoint)
    operations = [operation["operation"] for step in report["history"] for operation in step]
    assert operations[:3] == ["retop", "heal", "prune"] and operations[3:] in (["recover"], [])
    assert report["tensors_dropped"] > 0
    facts = inspect(done.report["checkpoint"])
    assert facts["problems"] == []
    assert facts["parameters"] == done.report["stages"][-1]["parameters"]
    for number, name in ((1, "retop"), (3, "prune")):
        verify(str(done.folder / "stages" / f"{number:02d}-{name}"), done.checkpoint)
    assert done.report["accepted"] == "recover" and "rejected" not in done.report
    assert all(stage["accepted"] for stage in done.report["stages"])
    assert sorted(path.name for path in (done.folder / "stages").iterdir()) == ["01-retop", "02-profile", "03-prune"]
    hidden = [path for path in done.folder.rglob(".*")]
    assert hidden == []  # no staging folders, no locks


def test_table(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    show(done.report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "On held-out text (report split)"
    rows = {line[:24].strip(): line[24:].split("  ") for line in lines[1:] if line.strip()}
    for row in (
        "experts, top-k", "parameters", "active parameters", "active FLOPs per token", "size", "tokens/s",
        "utilization entropy", "busiest expert / mean", "perplexity", "arithmetic", "js", "perplexity ratio",
    ):  # fmt: skip
        cells = [cell for cell in rows[row] if cell.strip()]
        assert len(cells) == len(STAGES), (row, cells)
    (healed,) = (stage for stage in done.report["stages"] if "bare" in stage)
    for row, name in (("perplexity", "perplexity"), ("ratio", "perplexity_ratio")):
        assert "".join(rows[f"bare cut: {row}"]).split() == [f"{healed['bare'][name]:.3f}"]
    assert any(all(stage in line for stage in STAGES) for line in lines)
    assert any(line.startswith("retop closed ") and "% of the loss gap to the original" in line for line in lines)
    assert lines[-1].startswith(f"checkpoint: {done.folder / 'checkpoint'}; figures: {done.folder / 'figures.json'}")
