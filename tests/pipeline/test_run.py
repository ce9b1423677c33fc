"""``run``: figures, journal, the checkpoint at the end, and what a failure leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.cli.run import _show as show
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.pipeline import run as module
from moesurgeon.pipeline.bare import bare_plan
from moesurgeon.pipeline.evaluate import evaluate
from moesurgeon.pipeline.inspect import inspect
from moesurgeon.pipeline.options import HealSpec, Running, Text, Writing
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recipe import Step
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.run import RunOutput, run
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.profiling.artefact import load_profile
from moesurgeon.progress import Silent
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
    assert [line["stage"] for line in lines] == ["original", "retop", "profile", "prune", "recover"]
    assert [line for line in lines if line["stage"] != "profile"] == done.report["stages"]
    taken = load_profile(done.folder / lines[2]["profile"])
    # What calibrates is not what is reported on.
    assert set(taken.origin.splits.values()) == {"calibration"}
    assert taken.statistics.domains == ("arithmetic", "js")


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


# ---- folders and failures, with measurements that cost nothing


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(_recipe: object, stage: str, checkpoint: str, *_rest: object, **_more: object) -> dict[str, Any]:
        return {"stage": stage, "checkpoint": checkpoint}

    monkeypatch.setattr(module, "_measured", measured)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"checkpoint: {BUILTIN[0]}\nsteps: [{{retop: {{}}}}]\n")
    return path


def _fail(*_arguments: object, **_options: object) -> None:
    raise CheckpointError("no luck; try again")


@pytest.mark.usefixtures("cheap")
def test_failing_step_leaves_no_figures(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "retop", _fail)
    with pytest.raises(CheckpointError, match="no luck"):
        run(recipe, RunOutput(output=out))
    assert sorted(path.name for path in out.iterdir()) == ["journal.jsonl", "stages"]
    assert [json.loads(line)["stage"] for line in (out / "journal.jsonl").read_text().splitlines()] == ["original"]


@pytest.mark.usefixtures("cheap")
def test_overwrite_replaces_a_run_and_nothing_else(recipe: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not the folder of a run"):
            run(recipe, RunOutput(output=out, overwrite=overwrite))
    (out / "journal.jsonl").write_text("dear diary")  # somebody else's
    with pytest.raises(UsageError, match="is not the folder of a run"):
        run(recipe, RunOutput(output=out, overwrite=True))
    assert sorted(path.name for path in out.iterdir()) == ["journal.jsonl", "mine.txt"]
    assert (out / "journal.jsonl").read_text() == "dear diary"


@pytest.mark.usefixtures("cheap")
def test_a_run_is_replaced_on_request(recipe: Path, out: Path) -> None:
    run(recipe, RunOutput(output=out))
    (out / "checkpoint" / "mark").touch()
    with pytest.raises(UsageError, match="holds a run already; choose another folder or add --overwrite"):
        run(recipe, RunOutput(output=out))
    assert (out / "checkpoint" / "mark").exists()
    run(recipe, RunOutput(output=out, overwrite=True))
    assert not (out / "checkpoint" / "mark").exists() and (out / "figures.json").exists()
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "recipe.yaml"]


@pytest.mark.usefixtures("cheap")
def test_a_run_is_kept_until_the_next_one_is_complete(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe, RunOutput(output=out))
    figures = (out / "figures.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(module, "retop", _fail)
        for _attempt in range(2):
            with pytest.raises(CheckpointError):
                run(recipe, RunOutput(output=out, overwrite=True))
            assert not (out / "figures.json").exists()
            assert (out.with_name("out.previous") / "figures.json").read_text() == figures
    run(recipe, RunOutput(output=out, overwrite=True))
    assert (out / "figures.json").exists() and not out.with_name("out.previous").exists()


@pytest.mark.usefixtures("cheap")
def test_impossible_recipe_does_not_touch_an_earlier_run(recipe: Path, out: Path) -> None:
    run(recipe, RunOutput(output=out))
    recipe.write_text(f"checkpoint: {BUILTIN[0]}\nsteps: [{{retop: {{top_k: 7}}}}]\n")
    with pytest.raises(UsageError, match="between 1 and"):
        run(recipe, RunOutput(output=out, overwrite=True))
    assert (out / "figures.json").exists() and not out.with_name("out.previous").exists()


@pytest.mark.usefixtures("cheap")
def test_healing_has_the_recipe_s_text_and_teacher(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[HealSpec] = []
    monkeypatch.setattr(module, "retop", lambda *_given, heal, **_others: seen.append(heal) or {})
    monkeypatch.setattr(module, "prune", lambda _source, spec, *_given: seen.append(spec.heal) or {})
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"checkpoint: {BUILTIN[0]}\ntext: {{traces: [js=builtin:json], length: 64}}\nsteps:\n"
        "  - retop: {heal: {}}\n"
        "  - prune: {keep_experts: k, heal: {traces: [builtin:logs], length: 32, teacher: other}}\n"
    )
    run(path, RunOutput(output=out))
    assert seen == [
        HealSpec(traces=("js=builtin:json",), length=64, teacher=BUILTIN[0]),
        HealSpec(traces=("builtin:logs",), length=32, teacher="other"),
    ]


@pytest.mark.usefixtures("cheap")
def test_what_is_sampled_is_healed_on_from_then_on(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the checkpoint that the recipe begins with, whatever is cut by then."""
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "retop", lambda *_given, heal, **_others: seen.append(heal.traces) or {})
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"checkpoint: {BUILTIN[0]}\ntext: {{traces: [js=builtin:json]}}\nsteps:\n"
        "  - sample: {tokens: 300, length: 100, rows: 4, uniform: true}\n"
        "  - retop: {heal: {}}\n"
        "  - sample: {tokens: 200, length: 50, rows: 4}\n"
        "  - retop: {heal: {traces: [builtin:logs]}}\n"
    )
    run(path, RunOutput(output=out))
    uniform, own = (out / "stages" / name for name in ("01-sample-uniform.jsonl", "03-sample-own.jsonl"))
    assert seen == [
        ("js=builtin:json", f"uniform={uniform}"),
        ("builtin:logs", f"uniform={uniform}", f"own={own}"),
    ]
    assert all(json.loads(line)["text"] for file in (uniform, own) for line in file.read_text().splitlines())
    journal = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["path"]) for line in journal if "texts" in line] == [
        ("sample", "stages/01-sample-uniform.jsonl"), ("sample", "stages/03-sample-own.jsonl")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("{sample: {length: 513}}, {retop: {heal: {}}}", "does not fit into the context"),
        ("{sample: {}}, {retop: {heal: {traces: ['own=builtin:json']}}}", "own is what sample writes"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_at_once(steps: str, says: str, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"checkpoint: {BUILTIN[0]}\nsteps: [{steps}]\n")
    with pytest.raises(UsageError, match=says):
        run(path, RunOutput(output=out))
    assert not out.exists()


@pytest.mark.usefixtures("cheap")
def test_profile_alone_is_a_recipe(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "profile", lambda *arguments: seen.append(arguments[2]))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"checkpoint: {BUILTIN[0]}\nsteps: [{{profile: {{max_tokens: 64}}}}]\n")
    report = run(path, RunOutput(output=out))
    assert report["checkpoint"] == BUILTIN[0] and len(report["stages"]) == 1
    assert (seen[0].split, seen[0].max_tokens) == ("calibration", 64)


def test_a_cut_in_stages_ends_a_recipe_where_its_gate_fails(tmp_path: Path) -> None:
    """What passed is written and measured, the steps behind it are not begun."""
    recipe = tmp_path / "recipe.yaml"
    heal = "{method: none, max_tokens: 2048, heldout_tokens: 1024}"
    recipe.write_text(
        f"""
checkpoint: builtin:tiny-mixtral
text: {{traces: [builtin:json], max_tokens: 2048}}
running: {{device: cpu, dtype: float32}}
report_tokens: 1024
steps:
  - prune: {{stages: [7, 2], gates: ["perplexity_ratio < 1.3"], heal: {heal}}}
  - retop: {{top_k: 1}}
"""
    )
    report = run(recipe, RunOutput(output=tmp_path / "run"))
    assert [stage["stage"] for stage in report["stages"]] == ["original", "prune"]
    assert report["stages"][-1]["experts"] == 7 and not report["gate"]["passed"]
    assert report["checkpoint"].endswith("01-prune")


def test_retop_is_foreseen_by_the_profile_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENTROPY_TOKENS", 256)
    notes: list[str] = []

    class Noted(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "checkpoint: builtin:tiny-deepseek\ntext: {traces: ['builtin:json'], length: 64}\nreport_tokens: 256\n"
        "steps:\n  - profile: {max_tokens: 256}\n  - retop:\n"
    )
    run(recipe, RunOutput(output=tmp_path / "run"), Noted())
    assert any("an even share of the profile's tokens is 16 for each expert" in note for note in notes)
