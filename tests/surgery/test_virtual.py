"""Virtual pruning as a plan: the bias and nothing else, in every dtype, replayed and verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import CheckpointError, OutputError, UsageError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import compose
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.virtual import OUT_OF_REACH, _put_out_of_reach, bias_of, least_of_group, plan_virtual
from tests.families.conftest import Stock, stock
from tests.families.factory import load_tensors

__all__ = ["stock"]

WITH_BIAS = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1", "ernie4_5_moe", "minimax_m2", "lfm2_moe", "gpt_oss")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def _kept(subject: Subject) -> dict[int, list[int]]:
    """Other experts and another number in every layer; two in each of two groups at least."""
    some = [[0, 1, 2, 5, 6], [1, 3, 4, 5, 6, 7], [0, 2, 4, 7], list(range(8))]
    return {layer: some[number % 4] for number, layer in enumerate(subject.anatomy.moe_layers)}


@pytest.mark.parametrize("name", [*WITH_BIAS, "deepseek_v3 fused", "ernie4_5_moe fused", "deepseek_v3 mtp"])
def test_only_the_bias_changes(name: str, stock: Stock, out: Path) -> None:
    subject = open_subject(str(stock(name)))
    kept = _kept(subject)
    apply(plan_virtual(subject.anatomy, kept), subject.checkpoint, out)
    before, after = load_tensors(subject.root), load_tensors(out)
    assert before.keys() == after.keys()
    biases = {bias_of(subject.anatomy, layer): layer for layer in kept}
    assert None not in biases
    changed = 0
    for tensor in before:
        if torch.equal(before[tensor], after[tensor]):
            continue
        assert tensor in biases and after[tensor].dtype == before[tensor].dtype
        stay = kept[biases[tensor]]
        expected = torch.full_like(before[tensor], OUT_OF_REACH)
        expected[..., stay] = before[tensor][..., stay]
        assert torch.equal(after[tensor], expected)
        changed += 1
    assert changed == sum(len(experts) < 8 for experts in kept.values()) > 0
    assert open_subject(str(out)).anatomy.config == subject.anatomy.config
    report = verify(str(out), str(subject.root))
    assert report["tensors_equal"] == len(before) and report["tensors_replaced"] == report["tensors_dropped"] == 0
    (operation,) = report["history"][0]
    assert operation["operation"] == "virtual-prune"
    assert operation["dropped"] == {
        str(layer): [expert for expert in range(8) if expert not in stay]
        for layer, stay in kept.items()
        if len(stay) < 8
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_every_dtype_that_a_bias_is_stored_in(dtype: str, shape: tuple[int, ...]) -> None:
    bias = torch.linspace(-3, 9, 6).view(shape).to(DTYPES[dtype])
    function = _put_out_of_reach(TensorSpec("bias", dtype, shape), [1, 4])
    raw = function(bias.view(torch.uint8).numpy().tobytes())
    expected = bias.clone()
    expected[..., [1, 4]] = -1e4
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).view(shape), expected)
    assert float(expected.max()) == 9


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(UsageError, match="bias is stored as F8_E4M3, which holds no bias of -10000"):
        _put_out_of_reach(TensorSpec("bias", "F8_E4M3", (4,)), [1])


@pytest.mark.parametrize("wrong", [OUT_OF_REACH, float("nan"), float("-inf")])
def test_who_is_out_of_reach_already_cannot_stay(wrong: float) -> None:
    bias = torch.tensor([0.5, wrong, 0.25, 0.0])
    spec = TensorSpec("bias", "F32", (4,))
    with pytest.raises(CheckpointError, match="bias has expert 1 out of reach already, and it is to stay"):
        _put_out_of_reach(spec, [3])(bias.numpy().tobytes())
    assert _put_out_of_reach(spec, [1, 3])(bias.numpy().tobytes())


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "qwen2_moe", "granitemoe", "jamba"])
def test_families_without_a_bias_are_told_what_to_do(name: str, stock: Stock) -> None:
    anatomy = open_subject(str(stock(name))).anatomy
    with pytest.raises(UsageError, match=r"--virtual needs a bias .* has none; leave --virtual out") as raised:
        plan_virtual(anatomy, dict.fromkeys(anatomy.moe_layers, (0, 1, 2, 3)))
    assert anatomy.family.title in str(raised.value)


def test_a_layer_that_chooses_by_a_table_keeps_all(stock: Stock) -> None:
    subject = open_subject(str(stock("deepseek_v4")))
    kept = dict.fromkeys(subject.anatomy.moe_layers, (0, 1, 2, 3))
    with pytest.raises(UsageError, match="layer 0 has none"):
        plan_virtual(subject.anatomy, kept)
    plan = plan_virtual(subject.anatomy, {**kept, 0: range(8)})
    assert sum(output.verb == "transform" for output in plan.outputs.values()) == 3


@pytest.mark.parametrize(
    ("name", "kept", "says"),
    [
        ("dots1", (3,), r"layer 1, routing group 0, keeps 1 experts; keep at least 2 in every group"),
        ("deepseek_v3", (0, 1, 2, 3, 4), r"layer 1, routing group 1, keeps 1 experts; keep at least 2 in every group"),
        ("minimax_m2", (3,), r"layer 0 keeps 1 experts; keep at least 2: each token is routed to 2"),
        ("minimax_m2", (3, 8), "layer 0 has no expert 8"),
        ("minimax_m2", (3, 3), "layer 0 names an expert twice"),
    ],
)
def test_what_could_not_run(name: str, kept: tuple[int, ...], says: str, stock: Stock) -> None:
    anatomy = open_subject(str(stock(name))).anatomy
    with pytest.raises(UsageError, match=says):
        plan_virtual(anatomy, dict.fromkeys(anatomy.moe_layers, kept))
    with pytest.raises(UsageError, match="no experts are given for layer"):
        plan_virtual(anatomy, {})


@pytest.mark.parametrize(
    ("groups", "kept_groups", "top_k", "least"), [(1, 1, 3, 3), (2, 1, 1, 2), (2, 1, 3, 3), (4, 2, 3, 2)]
)
def test_how_many_a_group_keeps(tmp_path: Path, groups: int, kept_groups: int, top_k: int, least: int) -> None:
    from tests.families.factory import save_checkpoint

    folder = save_checkpoint(
        tmp_path / "model", "deepseek_v3", n_group=groups, topk_group=kept_groups, num_experts_per_tok=top_k
    )
    assert least_of_group(open_subject(str(folder)).anatomy) == least


def test_all_that_stay_are_no_change(stock: Stock) -> None:
    anatomy = open_subject(str(stock("minimax_m2"))).anatomy
    assert plan_virtual(anatomy, dict.fromkeys(anatomy.moe_layers, range(8))).changes_nothing


def test_it_composes_and_a_forged_record_is_found(stock: Stock, tmp_path: Path) -> None:
    """Out of reach first, then removed and stored another way: one write that replays."""
    subject = open_subject(str(stock("ernie4_5_moe")))
    first = plan_virtual(subject.anatomy, _kept(subject))
    anatomy = first.result(subject.anatomy)
    plan = compose(first, plan_prune(anatomy, {1: (0, 1, 2, 3, 5, 6), 2: (1, 3, 4, 5, 6, 7)}))
    plan = compose(plan, plan_layout(plan.result(subject.anatomy), "fused"))
    apply(plan, subject.checkpoint, tmp_path / "out")
    assert verify(str(tmp_path / "out"), str(subject.root))["tensors_replaced"] == 0
    path = tmp_path / "out" / "moesurgeon.json"
    record = json.loads(path.read_text())
    record["history"][0]["operations"][0]["dropped"]["1"] = [7]
    path.write_text(json.dumps(record))
    with pytest.raises(OutputError, match="correction_bias differs from"):
        verify(str(tmp_path / "out"), str(subject.root))
    record["history"][0]["operations"][0]["dropped"] = {"1": list(range(8))}
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="which cannot be done to the source: layer 1 keeps 0 experts"):
        verify(str(tmp_path / "out"), str(subject.root))
