"""What plain peft makes of a saved adapter, on the checkpoint as stock transformers loads it, is what was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesurgeon.engine.model import logits_of
from moesurgeon.errors import NothingToDo, OutputError, UsageError
from moesurgeon.pipeline import recover as pipeline
from moesurgeon.pipeline.subject import Subject
from moesurgeon.recovery.schedule import Schedule
from tests.engine.small import saved, small_model
from tests.laws.recoveries import CASES, Case, case_of, random_corpora, recovered_to, texts

# The gradient alone moves nothing far: what is compared must differ by more than rounding.
QUICK = Schedule(rank=4, min_share=0.0, steps=10, tokens_per_step=64, judge_every=10, learning_rate=5e-2)
TOKENS = torch.arange(64).reshape(2, 32)
KINDS: dict[str, dict[str, Any]] = {
    "routers": {"adapt": ("routers",)},
    "adalora": {"adapt": ("routers",), "adapter": "adalora", "schedule": replace(QUICK, rank=2)},
    "experts": {"adapt": ("experts",)},
    "routers and experts-all": {"adapt": ("routers", "experts-all")},
}


@pytest.fixture(autouse=True)
def _best_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the loss of a few steps on random text: this is about what is written, not about how good it is."""
    from moesurgeon.recovery.judge import Judgement

    losses = iter(float(-number) for number in range(1000))
    monkeypatch.setattr(Judgement, "loss", property(lambda _: next(losses)))


def _stock(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def _recovered(subject: Subject, teacher: str, folder: Path, **options: Any) -> dict[str, Any]:
    given = {"schedule": QUICK, "save_adapter": folder / "adapter", **options}
    with pytest.MonkeyPatch.context() as patch, texts(patch, *random_corpora(subject)):
        return recovered_to(subject.name, teacher, folder / "out", **given)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_peft_computes_what_was_written(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2}
    teacher = saved(small_model(family, **small), tmp_path / "teacher")
    student = saved(small_model(family, seed=1, **small), tmp_path / "student")
    report = _recovered(student, teacher.name, tmp_path, **options)
    assert report["saved_adapter"] == str(tmp_path / "adapter")
    assert sorted(each.name for each in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    start, written = (logits_of(_stock(one), TOKENS, None) for one in (student.root, tmp_path / "out"))
    adapted = PeftModel.from_pretrained(_stock(student.root), str(tmp_path / "adapter")).eval()
    logits = logits_of(adapted, TOKENS, None)
    torch.testing.assert_close(logits, written, rtol=1e-4, atol=1e-4)
    assert (written - start).abs().max() > 0.01
    # And as one that peft finds the checkpoint of.
    found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(found, TOKENS, None), written, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload().state_dict()
    for name, weight in _stock(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_peft_computes_what_was_written_of_the_builtin_ones(
    options: dict[str, Any], tiny: Subject, tiny_mixtral_1: Subject, tiny_deepseek_1: Subject, tmp_path: Path
) -> None:
    """They are stored in bfloat16: merged by peft in float32 and rounded, the adapter gives the written tensors."""
    student = tiny_mixtral_1 if "mixtral" in tiny.name else tiny_deepseek_1
    _recovered(student, tiny.name, tmp_path, **options)
    adapted = PeftModel.from_pretrained(_stock(student.root), str(tmp_path / "adapter"))
    merged, start = adapted.merge_and_unload().state_dict(), _stock(student.root).state_dict()
    moved = 0
    for name, weight in _stock(tmp_path / "out").state_dict().items():
        rounded = merged[name].to(torch.bfloat16).float()
        # Sums in another order: a last place of bfloat16 where float32's last place decides, in few weights.
        torch.testing.assert_close(rounded, weight, rtol=2**-7, atol=1e-7)
        assert (rounded != weight).float().mean() < 1e-3
        moved += int(not torch.equal(weight, start[name]))
    assert moved == sum(count * len(student.anatomy.moe_layers) for count in _moved(student, options))


def _moved(student: Subject, options: dict[str, Any]) -> list[int]:
    """Return how many parameters of a layer each part adapts."""
    every = 5 if student.anatomy.shared_experts else 2
    return [{"routers": 1, "experts": 1, "experts-all": every}[name] for name in options["adapt"]]


def test_the_ranks_that_were_dealt_out_are_all_that_is_kept(tmp_path: Path) -> None:
    teacher = saved(small_model("mixtral", num_hidden_layers=2), tmp_path / "teacher")
    student = saved(small_model("mixtral", seed=1, num_hidden_layers=2), tmp_path / "student")
    report = _recovered(student, teacher.name, tmp_path, adapter="adalora", schedule=replace(QUICK, rank=4))
    ranks, config = report["ranks"]["written"], json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["base_model_name_or_path"] == student.name
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        for layer, rank in ranks.items():
            up = file.get_tensor(f"base_model.model.model.layers.{layer}.mlp.gate.lora_B.weight")
            assert int(up.abs().sum(0).count_nonzero()) == rank


# ---- refused, and left alone ----


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return case_of(CASES["mixtral float32 distill"], tmp_path)


def test_what_cannot_be_an_adapter_or_would_be_lost_is_refused_before_the_work(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "filled", pytest.fail)
    for adapt in (("full-routers",), ("full-routers", "experts")):
        with pytest.raises(UsageError, match="--save-adapter: whole routers are no adapter; train --adapt routers"):
            _recovered(case.student, case.teacher.name, tmp_path, adapt=adapt)
    mine = tmp_path / "adapter"
    mine.mkdir()
    (mine / "adapter_config.json").write_text("mine")
    with pytest.raises(UsageError, match="adapter is not empty; choose another folder or add --overwrite"):
        _recovered(case.student, case.teacher.name, tmp_path)
    (mine / "adapter_config.json").rename(mine / "notes.txt")
    with pytest.raises(
        UsageError, match=r"adapter is not an adapter .by its adapter_config.json., so --overwrite does not replace it"
    ):
        _recovered(case.student, case.teacher.name, tmp_path, overwrite=True)
    for folder in (tmp_path / "out", tmp_path / "out" / "adapter"):
        with pytest.raises(UsageError, match=r"and the output .* overlap"):
            _recovered(case.student, case.teacher.name, tmp_path, save_adapter=folder)
    with pytest.raises(UsageError, match="overlap"):
        _recovered(case.student, case.teacher.name, tmp_path, save_adapter=case.student.root / "adapter")
    assert [each.name for each in mine.iterdir()] == ["notes.txt"]


def test_an_earlier_adapter_stays_until_the_new_one_is_complete(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _recovered(case.student, case.teacher.name, tmp_path)
    before = {each.name: each.read_bytes() for each in (tmp_path / "adapter").iterdir()}
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OutputError("no room")

        patch.setattr(pipeline, "finish", full)
        with pytest.raises(OutputError, match="no room"):
            _recovered(case.student, case.teacher.name, tmp_path, overwrite=True, schedule=replace(QUICK, seed=1))
    assert {each.name: each.read_bytes() for each in (tmp_path / "adapter").iterdir()} == before
    _recovered(case.student, case.teacher.name, tmp_path, overwrite=True, schedule=replace(QUICK, seed=1))
    after = {each.name: each.read_bytes() for each in (tmp_path / "adapter").iterdir()}
    assert after["adapter_config.json"] == before["adapter_config.json"]
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_nothing_better_has_no_adapter(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesurgeon.recovery.judge import Judgement

    monkeypatch.setattr(Judgement, "loss", property(lambda _: 1.0))
    with pytest.raises(NothingToDo):
        _recovered(case.student, case.teacher.name, tmp_path)
    report = _recovered(case.student, case.teacher.name, tmp_path, allow_noop=True)
    assert report["saved_adapter"] is None
    assert not (tmp_path / "adapter").exists()


def test_a_dry_run_writes_none(case: Case, tmp_path: Path) -> None:
    _recovered(case.student, case.teacher.name, tmp_path, dry_run=True)
    assert not (tmp_path / "adapter").exists()
