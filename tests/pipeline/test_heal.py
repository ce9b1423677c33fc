"""Healing as an operation: it helps on a trained checkpoint, is left out where it does not, and keeps within memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from moesurgeon.errors import OutputError, UsageError
from moesurgeon.healing.pace import Pace
from moesurgeon.pipeline import heal as module
from moesurgeon.pipeline import heal_budget
from moesurgeon.pipeline.evaluate import evaluate
from moesurgeon.pipeline.options import HealSpec, Running, Text, Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.retop import RetopSpec
from tests.engine.tight import tight

TRACES = ("builtin:json", "builtin:logs")
RIDGE = HealSpec(traces=TRACES, method="ridge", max_tokens=4096, heldout_tokens=2048)
DISTILL = replace(RIDGE, method="distill", pace=Pace(steps=12, tokens_per_step=512, judge_every=4))
RUNNING = Running(device="cpu", dtype="float32")


def _retop(subject: Subject, out: Path, heal: HealSpec | None, running: Running = RUNNING) -> dict[str, Any]:
    return retop(subject.name, RetopSpec(top_k=1), Writing(output=out), heal=heal, running=running)


def _loss(checkpoint: Path) -> float:
    text = Text(traces=TRACES, max_tokens=4096)
    return float(evaluate(str(checkpoint), None, text, RUNNING)["loss"])


def test_it_helps_on_text_that_it_has_not_seen(tiny: Subject, tmp_path: Path) -> None:
    _retop(tiny, tmp_path / "bare", None)
    losses = [_loss(tmp_path / "bare")]
    for name, spec in (("ridge", RIDGE), ("distill", DISTILL)):
        report = _retop(tiny, tmp_path / name, spec)
        healing = report["healed"]
        losses.append(_loss(tmp_path / name))
        heldout = healing["heldout"]
        assert healing["kept"] and heldout["teacher"] < heldout["healed"] < heldout["bare"]
        closed = (heldout["bare"] - heldout["healed"]) / (heldout["bare"] - heldout["teacher"])
        assert healing["gap_closed"] == pytest.approx(closed)
        assert [layer["layer"] for layer in report["healing"]] == list(tiny.anatomy.moe_layers)
        assert verify(str(tmp_path / name), source=tiny.name)["tensors_replaced"] > 0
    assert losses == sorted(losses, reverse=True), losses


def test_the_same_bytes_each_time(tiny_mixtral: Subject, tmp_path: Path) -> None:
    for name in ("one", "two"):
        _retop(tiny_mixtral, tmp_path / name, DISTILL)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_what_does_not_lower_the_loss_is_left_out(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer was better by its own error, and the whole is worse: the plan is that of the cut alone."""
    stock = module.heal

    def worse(walk: Any, student: Any, *given: Any, **options: Any) -> Any:
        reports = stock(walk, student, *given, **options)
        for tensor in student.overlay.tensors.values():
            tensor.mul_(-1)
        return reports

    monkeypatch.setattr(module, "heal", worse)
    _retop(tiny_mixtral, tmp_path / "bare", None)
    healing = _retop(tiny_mixtral, tmp_path / "healed", RIDGE)["healed"]
    assert not healing["kept"] and healing["heldout"]["healed"] > healing["heldout"]["bare"]
    assert healing["gap_closed"] < 0
    bare, healed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("bare", "healed")
    )
    records = [json.loads(files.pop("moesurgeon.json"))["history"][0]["operations"] for files in (bare, healed)]
    assert bare == healed
    unused = records[1][0].pop("unused_documents")  # read to heal and to judge
    assert records[0] == records[1] and set(unused) == {"calibration", "validation"} and all(unused.values())


def test_none_measures(tiny_mixtral: Subject, tmp_path: Path) -> None:
    report = _retop(tiny_mixtral, tmp_path / "out", replace(RIDGE, method="none"))
    healing = report["healed"]
    assert report["healing"] == [] and not healing["kept"] and healing["gap_closed"] == 0
    assert healing["heldout"]["healed"] == healing["heldout"]["bare"] > healing["heldout"]["teacher"]
    operations = verify(str(tmp_path / "out"))["history"]
    assert [operation["operation"] for step in operations for operation in step] == ["retop"]


def test_two_cuts_come_back_to_the_first_checkpoint(tiny_mixtral: Subject, tmp_path: Path) -> None:
    """With a teacher of its own, a second cut also repairs what the first one left."""
    _retop(tiny_mixtral, tmp_path / "top1", None)
    kept = tmp_path / "kept.json"
    kept.write_text('{"0": [0,1,2,3,4,5,6], "1": [0,1,2,3,4,5,6], "2": [0,1,2,3,4,5,6], "3": [0,1,2,3,4,5,6]}')
    losses = {}
    for teacher in (None, tiny_mixtral.name):
        spec = PruneSpec(keep_experts=kept, heal=replace(RIDGE, teacher=teacher))
        report = prune(str(tmp_path / "top1"), spec, Writing(output=tmp_path / f"by {teacher}"), running=RUNNING)
        losses[teacher] = report["healed"]["heldout"]
    assert losses[tiny_mixtral.name]["teacher"] < losses[None]["teacher"]
    assert losses[tiny_mixtral.name]["bare"] == losses[None]["bare"]
    assert losses[tiny_mixtral.name]["healed"] < losses[None]["healed"]


def test_a_sample_heals_on_other_documents_and_is_judged_on_the_same(tiny_mixtral: Subject, tmp_path: Path) -> None:
    reports = {
        seed: _retop(tiny_mixtral, tmp_path / f"{seed}", replace(RIDGE, method="scale", sample=seed))["healed"]
        for seed in (None, 1, 2)
    }
    assert len({report["traces"]["logs"] for report in reports.values()}) == 3
    assert len({report["heldout_traces"]["logs"] for report in reports.values()}) == 1
    assert len({report["heldout"]["bare"] for report in reports.values()}) == 1
    with pytest.raises(UsageError, match="is no seed"):
        _retop(tiny_mixtral, tmp_path / "out", replace(RIDGE, sample=-1))


def test_one_s_own_text_heals_in_the_split_that_is_asked_for(tiny_mixtral: Subject, tmp_path: Path) -> None:
    """Of what a checkpoint was trained on, the calibration split may be all that it has not seen."""
    source = tmp_path / "own.jsonl"
    lines = (json.dumps({"text": f"{number} squared is {number**2}, and cubed {number**3}."}) for number in range(400))
    source.write_text("\n".join(lines))
    spec = HealSpec(traces=(str(source),), method="scale", max_tokens=512, heldout_tokens=256)
    hashes = {
        split: _retop(tiny_mixtral, tmp_path / f"{split}", replace(spec, split=split))["healed"]["traces"]["own"]
        for split in (None, "train", "calibration")
    }
    assert hashes[None] == hashes["train"] != hashes["calibration"]


def test_another_kind_of_teacher_is_refused(tiny_mixtral: Subject, tmp_path: Path) -> None:
    from tests.families.factory import save_checkpoint

    other = save_checkpoint(tmp_path / "other", "mixtral", num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"has 2 layers of width 64, .* no teacher for it; give the checkpoint"):
        _retop(tiny_mixtral, tmp_path / "out", replace(RIDGE, teacher=str(other)))


def _limit(more: int) -> Running:
    return replace(RUNNING, max_memory=psutil.Process().memory_info().rss + more)


def test_with_little_memory_the_same_comes_out(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers at a time, the text's states and the layer's data in files, which are gone afterwards."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    seen: list[tuple[bool, bool]] = []
    stock = module.heal

    def watched(walk: Any, student: Any, *given: Any, room: Any, **options: Any) -> Any:
        seen.append((student.source.supply.plan.is_resident, room.is_in_memory))
        return stock(walk, student, *given, room=room, **options)

    monkeypatch.setattr(module, "heal", watched)
    expected = _retop(tiny_mixtral, tmp_path / "resident", DISTILL)
    monkeypatch.setattr(heal_budget, "share_out", tight)
    found = _retop(tiny_mixtral, tmp_path / "streamed", DISTILL)
    assert seen == [(True, True), (False, False)]
    assert found["healing"] == expected["healing"]
    for path in (tmp_path / "resident").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "streamed" / path.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resident", "streamed"]


def test_a_layer_that_cannot_be_distilled_says_what_can_be_done(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesurgeon.healing.memory._of_step", lambda *_given: 10**11)
    says = r"give at least .*; distilling a layer takes [\d,]+ bytes .* --heal-method ridge takes [\d,]+$"
    with pytest.raises(UsageError, match=says):
        _retop(tiny_mixtral, tmp_path / "out", DISTILL, _limit(2_000_000_000))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["ridge", "distill"])
def test_a_refit_that_is_too_large_names_a_rank_that_fits(
    method: Any, tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moesurgeon.healing.memory.refit_bytes",
        lambda _high, wide, rank, *_given: 1000 if rank is not None and rank <= 40 else 10**11 + wide,
    )
    spec, running = replace(DISTILL, method=method), _limit(2_000_000_000)
    says = r"; (--heal-method ridge )?--heal-rank 32 takes [\d,]+ rather than 100,[\d,]+ and fits$"
    with pytest.raises(UsageError, match=says) as error:
        _retop(tiny_mixtral, tmp_path / "out", spec, running)
    assert ("--heal-method ridge --heal-rank" in str(error.value)) == (method == "distill")
    fits = replace(spec, method="ridge", pace=replace(spec.pace, rank=32))
    assert _retop(tiny_mixtral, tmp_path / "out", fits, running)["healed"]["kept"]
    with pytest.raises(UsageError) as error:
        _retop(tiny_mixtral, tmp_path / "other", spec, replace(RUNNING, max_memory=1))
    assert "rank" not in str(error.value)  # none fits


def test_a_rank_heals_and_is_recorded(tiny_mixtral: Subject, tmp_path: Path) -> None:
    losses = {}
    for rank in (8, 64, None):
        report = _retop(tiny_mixtral, tmp_path / f"{rank}", replace(RIDGE, pace=Pace(rank=rank)))
        losses[rank] = report["healed"]["heldout"]
        operation = verify(str(tmp_path / f"{rank}"))["history"][0][1]
        assert operation["operation"] == "heal"
    assert losses[None]["healed"] < losses[8]["healed"] < losses[8]["bare"]
    assert losses[64]["healed"] < losses[8]["healed"]


def test_a_full_disk_is_said(tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal_budget, "share_out", tight)

    def full(*_given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moesurgeon.engine.hidden.os.posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left on device"):
        _retop(tiny_mixtral, tmp_path / "out", RIDGE)
    assert not (tmp_path / "out").exists()


def test_a_layout_that_cannot_be_is_refused_before_the_work(
    tiny_mixtral: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.healing_text.read_text", pytest.fail)
    writing = Writing(output=tmp_path / "out", layout="qwen2-moe")
    with pytest.raises(UsageError, match="not for Mixtral"):
        retop(tiny_mixtral.name, RetopSpec(top_k=1), writing, heal=RIDGE, running=RUNNING)


def test_what_healing_takes_is_known_before(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ridge: a few matrices of the experts' width; distillation: five float32 values for each that is trained."""
    from moesurgeon.engine.streams import Overlay, Stream
    from moesurgeon.healing.memory import healing_bytes
    from moesurgeon.surgery.retop import plan_retop
    from tests.engine.small import source_of
    from tests.laws.walks import text

    # Of these sizes the activations would be most.
    monkeypatch.setattr("moesurgeon.healing.memory.chunk_tokens", lambda *_given: 1)
    monkeypatch.setattr("moesurgeon.healing.memory.block_bytes", lambda *_given: 0)
    student = Stream(source_of(tiny), Overlay(plan=plan_retop(tiny.anatomy, RetopSpec(top_k=1))))
    batches, pace = [text(64, 32)], Pace(tokens_per_step=8)
    layer = sum(tensor.numel() for name, tensor in student.blocks[1].module.named_parameters() if "proj" in name)
    none, scale, ridge, distill = (
        healing_bytes(student, method, pace, batches) for method in ("none", "scale", "ridge", "distill")
    )
    assert (none.work, none.held) == (0, 0) and scale.held == ridge.held
    assert scale.work < ridge.work < distill.work
    assert 36 * layer <= distill.work + distill.copy <= 38 * layer + 200_000
    row = tiny.anatomy.hidden * 12 + 16  # two states and what is missing; an expert, its weight, the importance
    assert distill.held == 96 * row + len(tiny.anatomy.moe_layers) * layer * 4
