"""What healing gives is what is written: judged as stored, kept only where it helps, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesurgeon.errors import CheckpointError
from moesurgeon.healing.planned import plan_healed
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, compose
from moesurgeon.surgery.prune import plan_prune
from tests.engine.small import source_of, stream_of
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, put_nan, save_checkpoint
from tests.healing.cases import HELD, Healed, cut, healed
from tests.laws.walks import LAYOUTS, same, walked

METHODS = ("scale", "ridge", "distill")


def _written(done: Healed, folder: Path, source: Path) -> dict[str, torch.Tensor]:
    plan = plan_healed(done.student, {"method": "test"})
    subject = open_subject(str(source))
    apply(plan, subject.checkpoint, folder)
    return load_tensors(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_healed_stream_is_the_checkpoint_that_is_written(name: str, stock: Stock, tmp_path: Path) -> None:
    """Every family and layout, by every method: to the last bit, with all the rest as the cut alone leaves it."""
    source = stock(name)
    subject = open_subject(str(source))
    plan = cut(subject, top_k=2 if subject.anatomy.top_k > 2 else 1)
    apply(plan, subject.checkpoint, tmp_path / "bare")
    bare = load_tensors(tmp_path / "bare")
    for method in METHODS:
        done = healed(subject, plan, method)
        assert [report["layer"] for report in done.reports] == list(subject.anatomy.moe_layers)
        for report in done.reports:
            assert report["healed_error"] <= report["error"]
            assert report["healed_error"] == min([report["error"], *(step["error"] for step in report["steps"])])
        found = _written(done, tmp_path / method, source)
        again = open_subject(str(tmp_path / method))
        assert same(walked([done.student], HELD)[0], walked([stream_of(again)], HELD)[0]), method
        changed = {each for each in bare if not torch.equal(bare[each], found[each])}
        assert found.keys() == bare.keys() and changed
        kinds = {each: again.anatomy.roles[each] for each in changed}
        assert {role.layer for role in kinds.values()} <= set(subject.anatomy.moe_layers)
        assert all(role.kind in ("expert", "fused") or "shared" in each for each, role in kinds.items()), kinds
        if method != "distill":
            assert all("down" in each or "w2" in each or "output_linear" in each for each in changed), changed
        report = verify(str(tmp_path / method), source=str(source))
        assert report["tensors_replaced"] >= len(changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "deepseek", "qwen2_moe"])
def test_what_is_judged_is_what_is_stored(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Computed in float32 and stored in less: the stream already has the rounding."""
    source = save_checkpoint(tmp_path / "source", name, dtype=dtype)
    subject = open_subject(str(source))
    done = healed(subject, cut(subject), "distill")
    assert any(step["kept"] for report in done.reports for step in report["steps"])
    found = _written(done, tmp_path / "healed", source)
    assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {dtype}
    assert same(walked([done.student], HELD)[0], walked([stream_of(open_subject(str(tmp_path / "healed")))], HELD)[0])


def test_a_v1_becomes_a_qwen2_in_the_same_write(stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(stock("deepseek")))
    done = healed(subject, cut(subject, top_k=1), "distill")
    plan = plan_healed(done.student, {})
    apply(compose(plan, plan_layout(plan.result(subject.anatomy), "qwen2-moe")), subject.checkpoint, tmp_path / "qwen")
    assert config_of(tmp_path / "qwen")["model_type"] == "qwen2_moe"
    written = stream_of(open_subject(str(tmp_path / "qwen")))
    for mine, theirs in zip(walked([done.student], HELD)[0], walked([written], HELD)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))
    assert verify(str(tmp_path / "qwen"), source=str(subject.root))["tensors_replaced"]


def test_the_other_layout_in_the_same_write(stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(stock("mixtral")))
    done = healed(subject, cut(subject, top_k=1), "ridge")
    plan = plan_healed(done.student, {})
    apply(compose(plan, plan_layout(plan.result(subject.anatomy), "fused")), subject.checkpoint, tmp_path / "fused")
    again = open_subject(str(tmp_path / "fused"))
    assert again.anatomy.layout.name == "fused"
    assert same(walked([done.student], HELD)[0], walked([stream_of(again)], HELD)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek fused", "deepseek_v3"])
def test_two_layers_at_a_time_heal_as_all_in_memory(name: str, method: str, stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(stock(name)))
    plan = cut(subject)
    expected = healed(subject, plan, method)
    source = source_of(subject)
    source.supply.allow(source.supply.least)
    assert not source.supply.plan.is_resident
    found = healed(subject, plan, method, source=source, folder=tmp_path)
    assert found.reports == expected.reports
    mine, theirs = found.student.overlay.tensors, expected.student.overlay.tensors
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[each], theirs[each]) for each in mine)
    assert len(list(tmp_path.glob("*.healed"))) == len(mine)
    assert same(walked([found.student], HELD)[0], walked([expected.student], HELD)[0])


def test_the_same_is_done_each_time(stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(stock("mixtral")))
    for folder in ("one", "two"):
        _written(healed(subject, cut(subject), "distill"), tmp_path / folder, subject.root)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / each).iterdir()} for each in ("one", "two"))
    assert one == two


def test_none_heals_nothing(stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    plan = cut(subject)
    done = healed(subject, plan, "none")
    assert done.reports == [] and done.student.overlay.tensors == {}
    assert plan_healed(done.student, {}) is plan


def test_nothing_to_learn_is_nothing_changed(stock: Stock) -> None:
    """A cut that cuts nothing: no error to begin with, no state that beats it."""
    subject = open_subject(str(stock("deepseek")))
    everyone = {layer: tuple(range(8)) for layer in subject.anatomy.moe_layers}
    plan = plan_prune(subject.anatomy, everyone)
    done = healed(subject, EditPlan(plan.outputs, plan.dropped, plan.config, plan.record), "distill")
    assert [report["error"] for report in done.reports] == pytest.approx([0.0] * 3, abs=1e-10)
    assert all(report["healed_error"] <= report["error"] for report in done.reports)


def test_experts_with_scales_are_refused(stock: Stock) -> None:
    subject = open_subject(str(stock("deepseek_v3 fp8")))
    with pytest.raises(CheckpointError, match=r"F8_E4M3 with scales.* convert the checkpoint to bfloat16"):
        healed(subject, cut(subject), "ridge")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "mixtral")
    subject = open_subject(str(source))
    put_nan(source, subject.anatomy.router_weight(1).replace("gate", "experts.0.w1"))
    with pytest.raises(CheckpointError, match="layer 1: hidden states are not finite"):
        healed(open_subject(str(source)), cut(subject), "ridge")
