"""Merging as a part of an operation: judged as a whole, recorded, written, and within memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.errors import UsageError
from moesurgeon.healing.align import EXACT
from moesurgeon.healing.memory import healing_bytes
from moesurgeon.healing.merge import Merger
from moesurgeon.healing.pace import METHODS, Pace
from moesurgeon.pipeline import heal as module
from moesurgeon.pipeline import heal_budget
from moesurgeon.pipeline.options import HealSpec, Running, Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recipe_file import read_recipe
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.run import RunOutput, run
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec
from tests.engine.small import source_of
from tests.engine.tight import tight
from tests.laws.walks import text

RUNNING = Running(device="cpu", dtype="float32")
MERGE = HealSpec(
    traces=("builtin:json", "builtin:logs"), method="scale", max_tokens=1024, heldout_tokens=512, merge=True
)


def _kept(subject: Subject, folder: Path) -> Path:
    path = folder / "kept.json"
    keep = list(range(subject.anatomy.experts))[: -subject.anatomy.experts // 4]
    path.write_text(str({str(layer): keep for layer in subject.anatomy.moe_layers}).replace("'", '"'))
    return path


def _prune(subject: Subject, out: Path, heal: HealSpec) -> dict[str, Any]:
    spec = PruneSpec(keep_experts=_kept(subject, out.parent), heal=heal)
    return prune(subject.name, spec, Writing(output=out), running=RUNNING)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Let what is judged in turn have these losses; merged in every layer."""
    given = iter(losses)
    monkeypatch.setattr(module, "losses_of", lambda _measured: {"loss": next(given), "teacher": 1.0})
    stock = Merger.merged

    def better(self: Merger, layer: Any, data: Any) -> Any:
        found = stock(self, layer, data)
        assert found is not None
        block = self._student.blocks[layer.number]
        own = block.module.state_dict()
        values = {name: own[name] * 0.9 for name in found.values}
        return replace(found, values=values)

    monkeypatch.setattr(Merger, "merged", better)
    monkeypatch.setattr("moesurgeon.healing.heal.error_of", _falling())


def _falling() -> Any:
    """An error that is smaller each time that it is asked for: whatever comes last is taken."""
    state = {"error": 1.0}

    def error_of(*_given: Any) -> float:
        state["error"] *= 0.99
        return state["error"]

    return error_of


@pytest.mark.parametrize("method", ["scale", "none"])
def test_better_as_a_whole_is_written(
    method: Any, tiny: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _losses(monkeypatch, 2.0, 1.5, *([1.6] if method == "scale" else []))
    report = _prune(tiny, tmp_path / "out", replace(MERGE, method=method))
    healing = report["healed"]
    assert healing["merge"] and healing["kept"]
    unmerged = 1.6 if method == "scale" else 2.0
    assert healing["heldout"] == {"teacher": 1.0, "bare": 2.0, "healed": 1.5, "merged": 1.5, "unmerged": unmerged}
    for layer in report["healing"]:
        step = layer["steps"][0]
        assert (
            step["step"] == "merge"
            and step["kept"]
            and set(map(int, step["into"])) == set(report["dropped"][str(layer["layer"])])
        )
        assert set(step["into"].values()) <= set(report["kept"][str(layer["layer"])])
    checked = verify(str(tmp_path / "out"), source=tiny.name)
    operation = checked["history"][0][-1]
    assert operation["operation"] == "heal" and operation["merge"] is True
    assert any("gate" in name or "w1" in name for name in operation["replaced"])


def test_worse_as_a_whole_is_healed_without(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better in every layer and worse in the end: the very bytes that healing without gives."""
    _prune(tiny_mixtral, tmp_path / "plain", replace(MERGE, merge=False))
    with monkeypatch.context() as patched:
        stock = module.losses_of
        calls: list[dict[str, float]] = []

        def judged(measured: Any) -> dict[str, float]:
            calls.append(stock(measured))
            return {**calls[-1], "loss": 9.0} if len(calls) == 2 else calls[-1]

        patched.setattr(module, "losses_of", judged)
        stock_merged = Merger.merged

        def scaled(self: Merger, layer: Any, data: Any) -> Any:
            found = stock_merged(self, layer, data)
            own = self._student.blocks[layer.number].module.state_dict()
            return replace(
                found, values={name: own[name] * (0.9 if "down" in name else 1) for name in own if "experts" in name}
            )

        patched.setattr(Merger, "merged", scaled)
        report = _prune(tiny_mixtral, tmp_path / "merged", MERGE)
    healing = report["healed"]
    assert len(calls) == 3 and healing["heldout"]["merged"] == 9.0
    assert not healing["merge"] and healing["kept"]
    assert all(not step["kept"] for layer in report["healing"] for step in layer["steps"] if step["step"] == "merge")
    assert all(layer["steps"][0]["step"] == "merge" for layer in report["healing"])
    plain, merged = (_bytes(tmp_path / name) for name in ("plain", "merged"))
    assert plain.keys() == merged.keys()
    assert all(merged[name] == content for name, content in plain.items() if name.endswith(".safetensors"))


def test_with_little_memory_the_same_comes_out(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _prune(tiny_mixtral, tmp_path / "resident", MERGE)
    monkeypatch.setattr(heal_budget, "share_out", tight)
    found = _prune(tiny_mixtral, tmp_path / "streamed", MERGE)
    assert found["healed"].pop("memory") != expected["healed"].pop("memory")
    assert found["healing"] == expected["healing"] and found["healed"] == expected["healed"]
    assert _bytes(tmp_path / "resident") == _bytes(tmp_path / "streamed")


def test_nothing_to_fold_is_refused(tiny_mixtral: Subject, tmp_path: Path) -> None:
    writing = Writing(output=tmp_path / "out")
    with pytest.raises(UsageError, match="none is pruned: leave it out"):
        retop(tiny_mixtral.name, RetopSpec(top_k=1), writing, heal=MERGE, running=RUNNING)
    assert not (tmp_path / "out").exists()


def test_recipes_say_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    head = "checkpoint: builtin:tiny-mixtral\nsteps:\n"
    path.write_text(f"{head}  - profile:\n  - prune: {{keep: 6, heal: {{method: ridge, merge: true}}}}\n")
    assert read_recipe(path).steps[1].heal == HealSpec(method="ridge", merge=True)
    path.write_text(f"{head}  - retop: {{top_k: 1, heal: {{merge: true}}}}\n")
    with pytest.raises(UsageError, match="merge: true} is for prune"):
        run(path, RunOutput(output=tmp_path / "out"))


def test_what_merging_takes_is_known_before(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs of all experts or what a pair takes, beside the merged experts twice; without --heal-method too."""
    count = tiny.anatomy.experts * 3 // 4
    plan = plan_prune(tiny.anatomy, {layer: range(count) for layer in tiny.anatomy.moe_layers})
    student = Stream(source_of(tiny), Overlay(plan=plan))
    batches: Sequence[Any] = [text(64, 32)]
    plain, merging = (
        {method: healing_bytes(student, method, Pace(tokens_per_step=8), batches, merge=merge) for method in METHODS}
        for merge in (False, True)
    )
    layer = sum(tensor.numel() for name, tensor in student.blocks[1].module.named_parameters() if "proj" in name)
    size = torch.float32.itemsize
    assert plain["none"].work == 0 and merging["none"].work >= 2 * layer * size + (256 << 20)
    for method in METHODS:
        assert merging[method].work >= plain[method].work + (2 * layer * size if method != "none" else 0)
        assert merging[method].held >= plain[method].held + len(tiny.anatomy.moe_layers) * layer * size
    monkeypatch.setattr("moesurgeon.healing.memory.OUTPUTS", 1)
    width, hidden = tiny.anatomy.expert_width, tiny.anatomy.hidden
    assert width < EXACT
    monkeypatch.setattr("moesurgeon.healing.memory.SAMPLE", 10_000_000)
    more = healing_bytes(student, "ridge", Pace(), batches, merge=True).work
    assert more >= (2 * 10_000_000 * width + 6 * hidden * width) * size
