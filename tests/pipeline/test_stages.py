"""Cuts in stages: what is accepted is written, what is rolled back leaves no trace, and a killed one goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import GateFailed, InputError, OutputError, UsageError
from moesurgeon.pipeline import stages as module
from moesurgeon.pipeline.evaluate import evaluate
from moesurgeon.pipeline.heal import Healer
from moesurgeon.pipeline.options import HealSpec, Running, Text, Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.stage_folder import StageFolder
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.verify import verify

TRACES = ("builtin:json", "builtin:logs")
RIDGE = HealSpec(traces=TRACES, method="ridge", max_tokens=2048, heldout_tokens=1024)
RUNNING = Running(device="cpu", dtype="float32")
LOOSE, STRICT = "perplexity_ratio < 100", "perplexity_ratio < 1.0000001"


def _prune(subject: Subject, out: Path, **options: Any) -> dict[str, Any]:
    spec = PruneSpec(**{"heal": RIDGE, **options})
    return prune(subject.name, spec, Writing(output=out), running=RUNNING)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_stages_end_in_one_checkpoint(tiny: Subject, tmp_path: Path) -> None:
    experts, groups = tiny.anatomy.experts, tiny.anatomy.groups[0]
    counts = (experts - groups, experts - 2 * groups)
    report = _prune(tiny, tmp_path / "out", stages=counts, gates=(LOOSE,))
    assert [(line["experts_before"], line["experts_after"]) for line in report["stages"]] == [
        (experts, counts[0]),
        counts,
    ]
    assert all(line["accepted"] and line["gate"]["passed"] for line in report["stages"])
    first, last = report["stages"]
    for layer, left in report["kept"].items():
        assert left == last["kept"][layer] and set(left) < set(first["kept"][layer])  # in the source's numbering
        assert sorted([*left, *report["dropped"][layer]]) == list(range(experts))
        assert len(last["dropped"][layer]) == groups
    assert report["experts_after"] == counts[1] and report["gate"]["passed"]
    checked = verify(str(tmp_path / "out"), source=tiny.name)
    done = [operation["operation"] for step in checked["history"] for operation in step]
    expected = [["prune", "heal"] if line["healed"]["kept"] else ["prune"] for line in report["stages"]]
    assert done == expected[0] + expected[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    # What was judged is what was written.
    judged = last["judged"]
    text = Text(traces=TRACES, split="validation", max_tokens=RIDGE.heldout_tokens)
    assert evaluate(str(tmp_path / "out"), tiny.name, text, RUNNING)["loss"] == pytest.approx(judged["loss"], rel=1e-6)


def test_a_stage_that_is_rolled_back_leaves_no_trace(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prune(tiny_mixtral, tmp_path / "one", stages=(7,))
    losses = _losses(monkeypatch)
    _prune(tiny_mixtral, tmp_path / "probe", stages=(7, 4))
    between = f"loss < {(losses[0] + losses[1]) / 2}"
    assert losses[0] < losses[1]
    report = _prune(tiny_mixtral, tmp_path / "two", stages=(7, 4), gates=(between,), run=tmp_path / "run")
    assert [line["accepted"] for line in report["stages"]] == [True, False]
    assert not report["gate"]["passed"] and report["experts_after"] == 7  # exit code 4, with the last good state
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"stage-01", "profile"}


def _losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    stock = module.summarise

    def noted(measured: Any) -> Any:
        report = stock(measured)
        found.append(report["loss"])
        return report

    monkeypatch.setattr(module, "summarise", noted)
    return found


def test_where_nothing_passes_nothing_is_written(tiny_mixtral: Subject, tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match=r"gate failed: .* already with 4 of 8 experts; nothing was written"):
        _prune(tiny_mixtral, tmp_path / "out", keep=4, gates=(STRICT,))
    assert list(tmp_path.iterdir()) == []


def test_search_finds_the_smallest_count_that_passes(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one by one, in fewer attempts."""
    passes = {7, 6, 5}

    class Verdict:
        def __init__(self, _subject: Any, count: int) -> None:
            self.count = count

    asked: list[int] = []

    def judge(self: Any, name: str, state: Any, count: int) -> dict[str, Any]:
        asked.append(count)
        kept = {layer: tuple(range(count)) for layer in state.anatomy.routed_layers}
        cut = state.cut(kept, {})
        line = {
            "accepted": count in passes, "experts_before": 8, "experts_after": count, "criterion": "made up",
            "healing": [], "healed": {}, "warnings": [], "gate": {"passed": count in passes},
        }  # fmt: skip
        if count in passes:
            self._folder.accept(name, line, kept, {}, cut.plan)
        else:
            self._folder.reject(name, line)
        return dict(self._folder.entries[-1])

    monkeypatch.setattr(module._Stages, "_judge", judge)
    report = _prune(tiny_mixtral, tmp_path / "out", search=True, gates=(LOOSE,), run=tmp_path / "run")
    assert report["experts_after"] == 5 and report["gate"]["passed"]
    assert sorted(asked) == sorted(set(asked)) and len(asked) <= 3
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"count-0005"}
    # The least that may stay is the user's to say.
    report = _prune(tiny_mixtral, tmp_path / "floor", search=True, gates=(LOOSE,), keep=6)
    assert report["experts_after"] == 6


@pytest.mark.parametrize("point", ["before the first line", "in the second", "before the write"])
def test_a_killed_one_goes_on_and_ends_up_with_the_same(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    options: dict[str, Any] = {"stages": "25%:2", "gates": (LOOSE,)}
    expected = _prune(tiny_mixtral, tmp_path / "clean", **options)
    heals: list[int] = []
    stock = Healer.heal

    class Killed(BaseException):
        pass

    def counted(self: Healer, plan: Any) -> Any:
        heals.append(1)
        if point == "in the second" and len(heals) == 2:
            raise Killed
        return stock(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(Healer, "heal", counted)
        if point == "before the first line":
            patch.setattr(StageFolder, "_log", lambda *_given: (_ for _ in ()).throw(Killed))
        elif point == "before the write":
            patch.setattr(module, "finish", lambda *_given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            _prune(tiny_mixtral, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.stages").is_dir()
    heals.clear()
    monkeypatch.setattr(Healer, "heal", counted)
    point, left = "", {"before the first line": 2, "in the second": 1, "before the write": 0}[point]
    found = _prune(tiny_mixtral, tmp_path / "out", **options)
    assert len(heals) == left
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "clean")
    assert json.loads(json.dumps(found["stages"])) == json.loads(json.dumps(_without_speed(expected, found)))
    assert not (tmp_path / ".out.stages").exists()


def _without_speed(expected: dict[str, Any], found: dict[str, Any]) -> Any:
    for one, other in zip(expected["stages"], found["stages"], strict=True):
        one["judged"]["tokens_per_second"] = other["judged"]["tokens_per_second"]
    return expected["stages"]


def test_other_options_do_not_go_on_with_these_stages(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    _prune(tiny_mixtral, tmp_path / "out", stages=(7,), run=run)
    with pytest.raises(UsageError, match="holds stages of another operation"):
        _prune(tiny_mixtral, tmp_path / "other", stages=(6,), run=run)
    with pytest.raises(UsageError, match="holds stages of another operation"):
        _prune(tiny_mixtral, tmp_path / "other", stages=(7,), run=run, heal=replace(RIDGE, max_tokens=1024))
    (run / "stage-01" / "healed.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"header|damaged|safetensors"):
        _prune(tiny_mixtral, tmp_path / "other", stages=(7,), run=run)
    (run / "journal.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"journal.jsonl is damaged .* begin anew"):
        _prune(tiny_mixtral, tmp_path / "other", stages=(7,), run=run)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "letters.txt").write_text("dear")
    for place in (tmp_path / "other", tmp_path / "other" / "run"):
        with pytest.raises(UsageError, match="overlaps with the source or the output"):
            _prune(tiny_mixtral, tmp_path / "other", stages=(7,), run=place)
    with pytest.raises(UsageError, match="is not a folder of stages"):
        _prune(tiny_mixtral, tmp_path / "other", stages=(7,), run=other)
    assert not (tmp_path / "other").exists() and (other / "letters.txt").read_text() == "dear"


def test_what_an_interrupt_leaves_is_said(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, heals = Healer.heal, []

    def stopped(self: Healer, plan: Any) -> Any:
        heals.append(1)
        if len(heals) in (1, 3):
            raise KeyboardInterrupt
        return stock(self, plan)

    monkeypatch.setattr(Healer, "heal", stopped)
    options: dict[str, Any] = {"stages": (7, 6), "heal": replace(RIDGE, method="none")}
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        _prune(tiny_mixtral, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt, match="the same command goes on behind stage-01"):
        _prune(tiny_mixtral, tmp_path / "out", **options)
    assert _prune(tiny_mixtral, tmp_path / "out", **options)["experts_after"] == 6 and len(heals) == 4


def test_two_at_once_do_not_share_a_folder(tiny_mixtral: Subject, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(OutputError, match="another moesurgeon works in"):
        _prune(tiny_mixtral, tmp_path / "out", stages=(7,), run=tmp_path / "run")


@pytest.mark.parametrize("criterion", ["reconstruction", "healed"])
def test_stages_by_what_is_searched(tiny_mixtral: Subject, tmp_path: Path, criterion: str) -> None:
    """Each stage has a profile, and inner products, of what the one before it left; merging and protection go along."""
    heal = replace(RIDGE, max_tokens=2048, heldout_tokens=1024, merge=criterion == "healed")
    report = _prune(
        tiny_mixtral, tmp_path / "out", stages="25%:2", criterion=criterion, heal=heal, protect=("json=0.3",)
    )
    assert report["criterion"] == criterion and report["experts_after"] == 6
    for line in report["stages"]:
        assert line["criterion"] == criterion and line["evidence"]["protection"]["names"]
        assert set(line["evidence"]["explained"]) == {"0", "1", "2", "3"}
        assert ("choice" if criterion == "healed" else "reconstruction") in line["evidence"]
    verify(str(tmp_path / "out"), source=tiny_mixtral.name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heal": None, "stages": (7,)}, "--stages judges on text: name it with --heal"),
        ({"heal": None, "search": True}, "--search judges on text"),
        ({"heal": None, "keep": 6, "gates": (LOOSE,)}, "--gate judges on text"),
        ({"search": True}, "add --gate"),
        ({"search": True, "gates": (LOOSE,), "stages": "25%:2"}, "leave out --stages"),
        ({"stages": "25%:2", "keep": 6}, "leave out --keep"),
        ({"stages": "25%:2", "ratio": 0.25}, "leave out --ratio"),
        ({"below": 0.1, "gates": (LOOSE,)}, "--below does not go with"),
        ({"stages": (1,)}, "keep at least 2 experts"),
        ({"keep": 6, "gates": ("perplexity_rato < 2",)}, "perplexity_rato"),
        ({"gates": (LOOSE,)}, "say how many experts stay"),
        ({"stages": (7,), "virtual": True}, "--virtual does not go with --stages"),
    ],
)
def test_what_cannot_be_asked(tiny_mixtral: Subject, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _prune(tiny_mixtral, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_experts_can_be_judged(tiny_mixtral: Subject, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({str(layer): [0, 1, 2, 3, 4, 7] for layer in range(4)}))
    report = _prune(tiny_mixtral, tmp_path / "out", keep_experts=kept, gates=(LOOSE,))
    assert report["kept"]["0"] == [0, 1, 2, 3, 4, 7] and report["gate"]["passed"]
    kept.write_text(json.dumps({str(layer): [0, 1, 2, 3, 4, 9] for layer in range(4)}))
    with pytest.raises(InputError, match=r"kept.json: layer 0 has no expert 9"):
        _prune(tiny_mixtral, tmp_path / "other", keep_experts=kept, gates=(LOOSE,))


def test_a_dry_run_says_the_counts(tiny_mixtral: Subject, tmp_path: Path) -> None:
    spec = PruneSpec(stages="25%:2", heal=RIDGE)
    report = prune(tiny_mixtral.name, spec, Writing(output=tmp_path / "out", dry_run=True), running=RUNNING)
    assert [stage["experts_after"] for stage in report["stages"]] == [7, 6] and report["dry_run"]
    assert list(tmp_path.iterdir()) == []
