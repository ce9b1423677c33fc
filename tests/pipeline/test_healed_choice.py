"""``--criterion healed``: chosen, healed and recorded with one opening; no worse than what a profile would choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import NothingToDo, UsageError
from moesurgeon.pipeline import heal_budget, healed_choice
from moesurgeon.pipeline.heal import healer
from moesurgeon.pipeline.options import HealSpec, Running, Text, Writing
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.profiling.artefact import load_profile
from moesurgeon.progress import SILENT
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import plan_prune
from tests.engine.tight import tight

TRACES = ("builtin:json", "builtin:logs")
RIDGE = HealSpec(traces=TRACES, method="ridge", max_tokens=2048, heldout_tokens=1024)
RUNNING = Running(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A profile of each builtin checkpoint."""
    folder = tmp_path_factory.mktemp("profiles")
    found = {}
    for name in ("tiny-mixtral", "tiny-deepseek"):
        found[f"builtin:{name}"] = folder / name
        text = Text(traces=TRACES, max_tokens=2048)
        profile(f"builtin:{name}", ProfileOutput(output=folder / name), text, RUNNING)
    return found


def _spec(path: Path, **options: Any) -> PruneSpec:
    return PruneSpec(**{"profile": path, "keep": 7, "criterion": "healed", "heal": RIDGE, **options})


def test_chosen_healed_and_recorded(tiny_mixtral: Subject, taken: dict[str, Path], tmp_path: Path) -> None:
    spec = _spec(taken[tiny_mixtral.name])
    planned = prune(tiny_mixtral.name, spec, Writing(output=tmp_path / "out", dry_run=True), running=RUNNING)
    assert list(tmp_path.iterdir()) == []
    report = prune(tiny_mixtral.name, spec, Writing(output=tmp_path / "out"), running=RUNNING)
    assert {key: planned[key] for key in ("kept", "dropped", "choice", "plan")} == {
        **{key: report[key] for key in ("kept", "dropped", "choice")},
        "plan": planned["plan"],
    }
    assert report["criterion"] == "healed" and "stability" not in report and "low_support" in report
    healed = report["healed"]
    choice = report["choice"]
    assert choice["choice_traces"] == healed["traces"] and choice["choice_heldout_traces"] == healed["heldout_traces"]
    assert (choice["choice_tokens"], choice["choice_heldout_tokens"]) == (2048, 1024)
    for layer in choice["layers"]:
        assert layer["exact"] and layer["refitted"] == 8
        assert 0 < layer["healed_error"] <= layer["error"]
        for each in layer["criteria"].values():
            assert layer["healed_error"] <= each["healed_error"] <= each["error"] and len(each["kept"]) == 7
        assert set(layer["criteria"]) == {"frequency", "gate", "ean", "man", "reap", "traffic-reap"}
        same = layer["criteria"]["reap"]["kept"] == report["kept"][str(layer["layer"])]
        assert same == (layer["criteria"]["reap"]["healed_error"] == layer["healed_error"])
    operations = verify(str(tmp_path / "out"), source=tiny_mixtral.name)["history"][0]
    assert [step["operation"] for step in operations] == ["prune", "heal"]
    assert operations[0]["criterion"] == "healed" and operations[0]["choice_traces"] == healed["traces"]
    assert operations[0]["profile_traces"]
    assert operations[0]["choice_documents"] == operations[1]["documents"] and operations[1]["documents"]["calibration"]


def test_what_is_left_is_what_healing_finds(tiny_mixtral: Subject) -> None:
    """Of the first layer, before which nothing is cut: the same text, the same refit."""
    with healer(tiny_mixtral, RIDGE, RUNNING, SILENT, like=_any(tiny_mixtral), choosing=True) as opened:
        found = opened.choose(None, 7, starts={})
        kept = {layer: each.kept for layer, each in found.items()}
        _plan, report, _judged = opened.heal(plan_prune(tiny_mixtral.anatomy, kept))
    chosen, healed = found[0].left, report["layers"][0]
    assert chosen.bare == pytest.approx(healed["error"], rel=1e-4)
    assert chosen.healed == pytest.approx(healed["healed_error"], rel=0.02)  # which is rounded to bfloat16


def _any(subject: Subject) -> EditPlan:
    return plan_prune(subject.anatomy, dict.fromkeys(subject.anatomy.moe_layers, tuple(range(7))))


def test_with_little_memory_the_same_is_chosen(
    tiny_deepseek: Subject, taken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    spec = _spec(taken[tiny_deepseek.name], keep=15)
    expected = prune(tiny_deepseek.name, spec, Writing(output=tmp_path / "resident"), running=RUNNING)
    monkeypatch.setattr(heal_budget, "share_out", tight)
    found = prune(tiny_deepseek.name, spec, Writing(output=tmp_path / "streamed"), running=RUNNING)
    assert found["choice"] == expected["choice"] and found["healing"] == expected["healing"]
    reap = prune(
        tiny_deepseek.name, replace(spec, criterion="reap"), Writing(output=tmp_path / "reap"), running=RUNNING
    )
    asked = [report["healed"]["memory"]["estimate"] for report in (found, reap)]
    assert asked[0] > asked[1] > 0  # what the trials take is asked for
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reap", "resident", "streamed"]


def test_a_state_that_is_not_written_can_be_cut_further(
    tiny_mixtral: Subject, taken: dict[str, Path], tmp_path: Path
) -> None:
    """As stages do: chosen on what an earlier cut and its healing left, towards the first checkpoint."""
    anatomy = tiny_mixtral.anatomy
    first = plan_prune(anatomy, dict.fromkeys(anatomy.moe_layers, (0, 1, 2, 4, 5, 6, 7)))
    with healer(tiny_mixtral, RIDGE, RUNNING, SILENT, like=first, choosing=True) as opened:
        better, _report, _judged = opened.heal(first)
        starts = {layer: {"given": (0, 1, 2, 3, 4, 5)} for layer in anatomy.moe_layers}
        fixed = {anatomy.moe_layers[0]: frozenset({1, 6})}
        found = opened.choose(better, 6, starts=starts, fixed=fixed)
        bare = opened.choose(first, 6, starts=starts)
    for layer, each in found.items():
        assert each.refitted == (5 if layer in fixed else 7) and each.exact and len(each.kept) == 6
        assert fixed.get(layer, frozenset()) <= set(each.kept) <= set(range(7))
        if layer not in fixed:
            assert each.left.healed <= each.others["given"][1].healed
    # What the first healing repaired is not missing any more.
    last = anatomy.moe_layers[0]
    assert found[last].others["given"][1].bare < bare[last].others["given"][1].bare


def test_another_teacher_sets_the_target(tiny_mixtral: Subject, taken: dict[str, Path], tmp_path: Path) -> None:
    anatomy = tiny_mixtral.anatomy
    kept = tmp_path / "kept.json"
    kept.write_text(str({str(layer): [0, 1, 2, 4, 5, 6, 7] for layer in anatomy.moe_layers}).replace("'", '"'))
    prune(tiny_mixtral.name, PruneSpec(keep_experts=kept), Writing(output=tmp_path / "seven"))
    seven = open_subject(str(tmp_path / "seven"))
    like = plan_prune(seven.anatomy, dict.fromkeys(anatomy.moe_layers, tuple(range(6))))
    left = []
    for teacher in (None, tiny_mixtral.name):
        with healer(seven, replace(RIDGE, teacher=teacher), RUNNING, SILENT, like=like, choosing=True) as opened:
            left.append(opened.choose(None, 6, starts={})[anatomy.moe_layers[-1]].left.bare)
    assert left[0] < left[1]  # what the first cut lost is missing as well


def test_of_a_server_s_counts_only_frequency_can_say(taken: dict[str, Path]) -> None:
    statistics = load_profile(taken["builtin:tiny-mixtral"]).statistics
    assert set(healed_choice.starts_of(statistics, 6)[0]) == {"frequency", "gate", "ean", "man", "reap", "traffic-reap"}
    for name, array in statistics.sums.items():
        if not name.startswith("tokens"):
            array[:] = 0
    assert statistics.counts_only
    assert list(healed_choice.starts_of(statistics, 6)[0]) == ["frequency"]


def test_it_needs_a_cut_that_is_healed(tiny_mixtral: Subject, taken: dict[str, Path], tmp_path: Path) -> None:
    path, writing = taken[tiny_mixtral.name], Writing(output=tmp_path / "out")
    for spec, says in (
        (_spec(path, heal=None), "so it needs text: add --heal TRACES"),
        (_spec(path, heal=replace(RIDGE, method="none")), "--heal-method none heals nothing"),
        (PruneSpec(keep=7, criterion="healed", heal=RIDGE), "give --profile"),
        (_spec(path, keep=1), "keep at least 2 experts"),
    ):
        with pytest.raises(UsageError, match=says):
            prune(tiny_mixtral.name, spec, writing, running=RUNNING)
    with pytest.raises(NothingToDo, match="nothing to prune"):
        prune(tiny_mixtral.name, _spec(path, keep=8), writing, running=RUNNING)
    assert list(tmp_path.iterdir()) == []


def test_a_layout_that_cannot_be_is_refused_before_the_work(
    tiny_mixtral: Subject, taken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.healing_text.read_text", pytest.fail)
    writing = Writing(output=tmp_path / "out", layout="qwen2-moe")
    with pytest.raises(UsageError, match="not for Mixtral"):
        prune(tiny_mixtral.name, _spec(taken[tiny_mixtral.name]), writing, running=RUNNING)
