"""``run``: its folder, what its steps are given and what a failure leaves, with measurements that cost nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import CheckpointError, NothingToDo, OutputError, UsageError
from moesurgeon.pipeline import run as module
from moesurgeon.pipeline.inspect import inspect
from moesurgeon.pipeline.options import HealSpec, Writing
from moesurgeon.pipeline.run import RunOutput, run
from moesurgeon.progress import Silent
from tests.conftest import BUILTIN


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


def _keep_six(path: Path) -> None:
    path.write_text(json.dumps({layer: [0, 1, 2, 3, 4, 5] for layer in range(4)}))


def _writes(noted: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    """A step that says what it was given and writes an empty checkpoint."""

    def step(_source: str, spec: object, writing: Writing, *_rest: object, **options: object) -> dict[str, Any]:
        noted(spec=spec, **options)
        writing.output.mkdir()
        return {}

    return step


@pytest.mark.usefixtures("cheap")
def test_failing_step_leaves_no_figures(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "retop", _fail)
    with pytest.raises(CheckpointError, match="no luck"):
        run(recipe, RunOutput(output=out))
    assert sorted(path.name for path in out.iterdir()) == ["journal.jsonl", "run.json", "stages"]
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
    (out / "report.html").touch()
    with pytest.raises(UsageError, match="holds a run already; choose another folder or add --overwrite"):
        run(recipe, RunOutput(output=out))
    assert (out / "report.html").exists()
    run(recipe, RunOutput(output=out, overwrite=True))
    assert not (out / "report.html").exists() and (out / "figures.json").exists()
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
    monkeypatch.setattr(module, "retop", _writes(lambda **options: seen.append(options["heal"])))
    monkeypatch.setattr(module, "prune", _writes(lambda **options: seen.append(options["spec"].heal)))
    _keep_six(tmp_path / "k")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"checkpoint: {BUILTIN[0]}\ntext: {{traces: [js=builtin:json], length: 64}}\nsteps:\n"
        "  - retop: {heal: {}}\n"
        f"  - prune: {{keep_experts: k, heal: {{traces: [builtin:logs], length: 32, teacher: '{BUILTIN[0]}'}}}}\n"
    )
    run(path, RunOutput(output=out))
    assert seen == [
        HealSpec(traces=("js=builtin:json",), length=64, teacher=BUILTIN[0]),
        HealSpec(traces=("builtin:logs",), length=32, teacher=BUILTIN[0]),
    ]


@pytest.mark.usefixtures("cheap")
def test_what_is_sampled_is_healed_on_from_then_on(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the checkpoint that the recipe begins with, whatever is cut by then."""
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "retop", _writes(lambda **options: seen.append(options["heal"].traces)))
    monkeypatch.setattr(module, "prune", _writes(lambda **options: seen.append(options["spec"].heal.traces)))
    _keep_six(tmp_path / "k")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"checkpoint: {BUILTIN[0]}\ntext: {{traces: [js=builtin:json]}}\nsteps:\n"
        "  - sample: {tokens: 300, length: 100, rows: 4, uniform: true}\n"
        "  - retop: {heal: {}}\n"
        "  - sample: {tokens: 200, length: 50, rows: 4}\n"
        "  - prune: {keep_experts: k, heal: {traces: [builtin:logs]}}\n"
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
    assert report["accepted"] == "prune" and report["checkpoint"] == str(tmp_path / "run" / "checkpoint")
    assert inspect(report["checkpoint"])["experts"] == 7
    assert list((tmp_path / "run" / "stages").iterdir()) == [] and not (tmp_path / "run" / "rejected").exists()


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


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Which stages pass the recipe's gate; the others fail."""
    passes: dict[str, bool] = {}

    def measured(_recipe: object, stage: str, checkpoint: str, *_rest: object, **_more: object) -> dict[str, Any]:
        gate = {"passed": passes[stage]} if stage in passes else None
        return {"stage": stage, "checkpoint": checkpoint, **({"gate": gate} if gate else {})}

    monkeypatch.setattr(module, "_measured", measured)
    return passes


@pytest.fixture
def two_steps(tmp_path: Path) -> Path:
    path, kept = tmp_path / "recipe.yaml", tmp_path / "kept.json"
    _keep_six(kept)
    path.write_text(
        f"checkpoint: {BUILTIN[0]}\ngate: loss < 99\nsteps: [{{retop: {{}}}}, {{prune: {{keep_experts: {kept}}}}}]\n"
    )
    return path


def _folders(out: Path) -> set[str]:
    found = {path.parent for path in out.rglob("config.json")}
    return {str(path.relative_to(out)) for path in found}


def _journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("passes", "accepted", "folders"),
    [
        ((True, True), "prune", {"stages/01-retop", "checkpoint"}),
        ((False, True), "prune", {"stages/01-retop", "checkpoint"}),  # repaired by what came later
        ((True, False), "retop", {"checkpoint", "rejected"}),
        ((False, False), "original", {"stages/01-retop", "rejected"}),
    ],
)
def test_only_what_is_accepted_is_called_checkpoint(
    passes: tuple[bool, bool], accepted: str, folders: set[str], judged: dict[str, bool], two_steps: Path, out: Path
) -> None:
    retop, prune = passes
    judged.update(retop=retop, prune=prune)
    report = run(two_steps, RunOutput(output=out))
    assert report["accepted"] == accepted and _folders(out) == folders
    place = BUILTIN[0] if accepted == "original" else str(out / "checkpoint")
    assert report["checkpoint"] == place and report["gate"]["passed"] is prune
    assert report.get("rejected") == (None if prune else str(out / "rejected"))
    assert [stage["accepted"] for stage in report["stages"]] == [True, retop, prune]
    for stage in report["stages"]:  # where each one is now
        assert stage["checkpoint"] == BUILTIN[0] or (Path(stage["checkpoint"]) / "config.json").is_file()
    if accepted != "original":
        facts = inspect(report["checkpoint"])
        assert (facts["top_k"], facts["experts"]) == (1, 6 if accepted == "prune" else 8)
    figures = json.loads((out / "figures.json").read_text())
    assert {"output": str(out), **figures} == report
    end = _journal(out)[-1]
    assert end == {
        "stage": "end",
        **{name: report[name] for name in ("checkpoint", "accepted", "rejected") if name in report},
    }


def test_a_run_that_is_stopped_leaves_nothing_called_checkpoint(
    two_steps: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(_recipe: object, stage: str, checkpoint: str, *_rest: object, **_more: object) -> dict[str, Any]:
        if stage == "prune":
            raise KeyboardInterrupt
        return {"stage": stage, "checkpoint": checkpoint}

    monkeypatch.setattr(module, "_measured", measured)
    with pytest.raises(KeyboardInterrupt):
        run(two_steps, RunOutput(output=out))
    assert _folders(out) == {"stages/01-retop", "stages/02-prune"} and not (out / "figures.json").exists()


@pytest.mark.parametrize("passes", [True, False])
def test_a_step_that_finds_nothing_better_ends_the_run_with_what_there_is(
    passes: bool, judged: dict[str, bool], two_steps: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a veto of recover does, after hours of work; a gate that failed before it has the last word."""

    def nothing(*_arguments: object, **_options: object) -> None:
        raise NothingToDo("nothing better was found")

    monkeypatch.setattr(module, "prune", nothing)
    judged.update(retop=passes)
    if passes:
        with pytest.raises(NothingToDo, match=r"nothing better was found; the run ends with retop, .*/checkpoint"):
            run(two_steps, RunOutput(output=out))
    else:
        assert run(two_steps, RunOutput(output=out))["gate"] == {"passed": False}
    assert _folders(out) == {"checkpoint" if passes else "rejected"}
    assert json.loads((out / "figures.json").read_text())["accepted"] == ("retop" if passes else "original")
    assert _journal(out)[-2] == {"stage": "prune", "accepted": False, "why": "nothing better was found"}


@pytest.mark.usefixtures("cheap")
def test_a_cut_in_stages_of_which_none_passes_leaves_the_state_before(tmp_path: Path, out: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    heal = "{method: none, max_tokens: 1024, heldout_tokens: 512}"
    recipe.write_text(
        f"checkpoint: {BUILTIN[0]}\ntext: {{traces: [builtin:json]}}\nrunning: {{device: cpu, dtype: float32}}\n"
        f"steps: [{{retop: {{}}}}, {{prune: {{keep: 6, gates: [loss < 0], heal: {heal}}}}}, {{profile: {{}}}}]\n"
    )
    report = run(recipe, RunOutput(output=out))
    assert not report["gate"]["passed"] and report["gate"]["expression"] == "loss < 0"
    assert report["accepted"] == "retop" and _folders(out) == {"checkpoint"}
    assert [line["stage"] for line in _journal(out)] == ["original", "retop", "prune", "end"]


@pytest.mark.usefixtures("cheap")
def test_a_full_disk_is_no_bug(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(OutputError, match=r"No space left on device.*what its journal names is whole"):
        run(recipe, RunOutput(output=out))


RESUMED = """checkpoint: {checkpoint}
text: {{traces: [builtin:json]}}
steps:
  - profile: {{max_tokens: 512}}
  - prune: {{keep: 6}}
  - retop: {{}}
"""


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("killed_at", ["retop", "profile", "prune", "measured", "settle"])
def test_a_run_that_was_stopped_goes_on(
    killed_at: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures and bytes as undisturbed, and no finished step is done twice."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RESUMED.format(checkpoint=BUILTIN[0]))
    whole = run(recipe, RunOutput(output=tmp_path / "whole"))

    def killed(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    name = "_measured" if killed_at == "measured" else killed_at
    with monkeypatch.context() as patch:
        patch.setattr(module, name, _later(getattr(module, name), killed, 1 if killed_at == "measured" else 0))
        with pytest.raises(KeyboardInterrupt):
            run(recipe, RunOutput(output=out))
    assert not (out / "figures.json").exists()
    before = [line["stage"] for line in _journal(out)]
    called: list[str] = []
    for step in ("retop", "profile", "prune"):
        monkeypatch.setattr(module, step, _counted(getattr(module, step), step, called))
    resumed = run(recipe, RunOutput(output=out))
    assert called == ["profile", "prune", "retop"][max(0, len(before) - 1) :]
    for report in (whole, resumed):
        report.pop("seconds")
    assert json.dumps(resumed) == json.dumps(whole).replace(str(tmp_path / "whole"), str(out))
    files = {path.name: path.read_bytes() for path in (out / "checkpoint").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole" / "checkpoint").iterdir()}
    with pytest.raises(UsageError, match="holds a run already"):
        run(recipe, RunOutput(output=out))


@pytest.mark.usefixtures("cheap")
def test_what_was_begun_with_something_else_does_not_go_on(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "retop", _fail)
        with pytest.raises(CheckpointError):
            run(recipe, RunOutput(output=out))
    recipe.write_text(recipe.read_text() + "report_tokens: 4096\n")
    with pytest.raises(UsageError, match=r"was begun with another recipe.*or add --overwrite"):
        run(recipe, RunOutput(output=out))
    (out / "run.json").write_text("{")
    with pytest.raises(UsageError, match="was begun with another recipe"):
        run(recipe, RunOutput(output=out))


def _later(real: Callable[..., Any], then: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Do the real thing a number of times first."""
    left = iter([real] * times)

    def call(*arguments: Any, **options: Any) -> Any:
        return next(left, then)(*arguments, **options)

    return call


def _counted(real: Callable[..., Any], name: str, called: list[str]) -> Callable[..., Any]:
    def step(*arguments: Any, **options: Any) -> Any:
        called.append(name)
        return real(*arguments, **options)

    return step
