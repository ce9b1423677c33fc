"""What stands beside the experts is cut along or refused: nothing with an entry per expert is passed over."""

import json
from pathlib import Path

import pytest
import torch

from moesurgeon.errors import CheckpointError, OutputError, UsageError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.completeness import problems_of
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, save_checkpoint, save_tensors
from tests.families.second_opinion import KEPT, kept_of

ROUTERS = {
    "mixtral": "model.layers.{}.block_sparse_moe.gate",
    "qwen3_moe": "model.layers.{}.mlp.gate",
    "granitemoe": "model.layers.{}.block_sparse_moe.router.layer",
    "dbrx": "transformer.blocks.{}.ffn.router.layer",
    "hunyuan_v1_moe": "model.layers.{}.mlp.gate.wg",
    "gpt_oss": "model.layers.{}.mlp.router",
    "deepseek_v3 mtp": "model.layers.{}.mlp.gate",
    "ernie4_5_moe mtp": "model.layers.{}.mlp.gate",
    "deepseek_v3 fp8": "model.layers.{}.mlp.gate",
}


def _with(source: Path, target: Path, **extra: torch.Tensor) -> Subject:
    """Save ``source`` again with ``extra`` tensors."""
    return open_subject(str(_saved(source, target, **extra)))


def _saved(source: Path, target: Path, **extra: torch.Tensor) -> Path:
    return save_tensors(target, config_of(source), {**load_tensors(source), **extra})


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(
    ("part", "shape"),
    [("weight_scale", (8, 1)), ("weight_zero_point", (8, 1)), ("SCB", (8,)), ("weight_scale", (8, 4))],
)
def test_scales_of_a_router_are_cut_along(
    stock: Stock, tmp_path: Path, name: str, part: str, shape: tuple[int, ...]
) -> None:
    plain = open_subject(str(stock(name)))
    extra = {f"{ROUTERS[name].format(n)}.{part}": torch.randn(shape) for n in plain.anatomy.moe_layers}
    source = _with(plain.root, tmp_path / "source", **extra)
    kept = kept_of(source)
    apply(plan_prune(source.anatomy, kept), source.checkpoint, tmp_path / "out")
    found = load_tensors(tmp_path / "out")
    for layer in source.anatomy.moe_layers:
        scale = f"{ROUTERS[name].format(layer)}.{part}"
        assert torch.equal(found[scale], extra[scale][list(kept[layer])])
    assert verify(str(tmp_path / "out"), str(source.root))["tensors_equal"] == len(found)


@pytest.mark.parametrize(
    ("name", "bias", "shape"),
    [
        ("mixtral", "model.layers.{}.block_sparse_moe.e_score_correction_bias", (8,)),
        ("mixtral", "model.layers.{}.block_sparse_moe.gate.e_score_correction_bias", (8,)),
        ("qwen3_moe", "model.layers.{}.mlp.gate.bias", (8,)),
        ("qwen3_moe", "model.layers.{}.mlp.expert_bias", (8,)),
        ("deepseek_v3", "model.layers.{}.mlp.e_score_correction_bias", (8,)),
        ("deepseek_v3", "model.layers.{}.mlp.moe_statics.e_score_correction_bias", (1, 8)),
    ],
)
def test_selection_biases_that_the_family_does_not_have_are_cut_along(
    stock: Stock, tmp_path: Path, name: str, bias: str, shape: tuple[int, ...]
) -> None:
    plain = open_subject(str(stock(name)))
    extra = {bias.format(layer): torch.randn(shape) for layer in plain.anatomy.moe_layers}
    source = _with(plain.root, tmp_path / "source", **extra)
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, tmp_path / "out")
    found = load_tensors(tmp_path / "out")
    for layer in source.anatomy.moe_layers:
        assert torch.equal(found[bias.format(layer)], extra[bias.format(layer)][..., list(KEPT[layer])])


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("mlp.expert_usage_ema", (8,)),
        ("mlp.gate.expert_usage_ema", (8,)),
        ("mlp.coactivation", (8, 8)),
        ("mlp.gate.lora_B", (8, 4)),
        ("mlp.gate.weight_scale", (4, 8)),  # blocks of two rows, or something else
        ("mlp.gate.weight_scale_inv", (2, 1)),  # blocks of four rows, which a prune mixes
        ("mlp.slots", (16,)),  # for each choice of a token
    ],
)
def test_what_may_count_experts_stops_a_prune(stock: Stock, tmp_path: Path, part: str, shape: tuple[int, ...]) -> None:
    name = f"model.layers.2.{part}"
    source = _with(stock("qwen3_moe"), tmp_path / "source", **{name: torch.ones(shape)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[{shape[0]}.* nobody knows how to cut it"):
        plan_prune(source.anatomy, kept_of(source))
    assert verify(str(source.root))["tensors"] == len(source.checkpoint.tensors), "the source itself is whole"
    assert plan_prune(source.anatomy, dict.fromkeys(source.anatomy.moe_layers, range(8))).changes_nothing


def test_so_does_a_tensor_outside_the_layers(stock: Stock, tmp_path: Path) -> None:
    source = _with(stock("mixtral"), tmp_path / "source", **{"model.expert_load": torch.ones(4, 8)})
    with pytest.raises(CheckpointError, match=r"model\.expert_load has shape \[4, 8\]"):
        plan_prune(source.anatomy, kept_of(source))


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("mlp.gate.weight_scale", ()),
        ("mlp.gate.weight_scale", (1, 1)),
        ("mlp.gate.weight_scale_inv", (1, 8)),  # one block of rows, eight of columns
        ("mlp.gate.input_scale", (1,)),
        ("mlp.gate.pre_quant_scale", (64,)),
        ("mlp.norm.weight", (64,)),
        ("self_attn.sinks", (8,)),  # of attention heads
        ("mlp.experts.3.down_proj.weight_scale", (8, 1)),  # of one expert
    ],
)
def test_what_counts_no_experts_is_copied(stock: Stock, tmp_path: Path, part: str, shape: tuple[int, ...]) -> None:
    names = [f"model.layers.{layer}.{part}" for layer in range(4)]
    if "experts" in part:
        names = [name.replace(".3.down", f".{e}.down") for name in names for e in range(8)]
    source = _with(stock("qwen3_moe"), tmp_path / "source", **{name: torch.ones(shape) for name in names})
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, tmp_path / "out")
    assert load_tensors(tmp_path / "out")[names[0]].shape == shape
    verify(str(tmp_path / "out"), str(source.root))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen2_moe", {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}),
        ("qwen2_moe", {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
        ("mixtral", {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}),
        ("deepseek_v3", {"moe_intermediate_size": 8, "n_shared_experts": 1, "vocab_size": 8}),
        ("granitemoeshared", {"hidden_size": 8, "intermediate_size": 8, "shared_intermediate_size": 8}),
        ("mixtral", {"num_hidden_layers": 8}),
    ],
)
def test_sizes_that_equal_the_number_of_experts_are_no_false_alarm(
    tmp_path: Path, name: str, sizes: dict[str, int]
) -> None:
    source = open_subject(str(save_checkpoint(tmp_path / "source", name, **sizes)))
    kept = dict.fromkeys(source.anatomy.moe_layers, (0, 2, 5, 6))
    apply(plan_prune(source.anatomy, kept), source.checkpoint, tmp_path / "out")
    verify(str(tmp_path / "out"), str(source.root))


def test_one_scale_for_all_fused_experts_is_copied(stock: Stock, tmp_path: Path) -> None:
    name = "model.layers.{}.mlp.experts.down_proj_input_scale"
    extra = {name.format(layer): torch.tensor(2.0) for layer in range(4)}
    source = _with(stock("qwen3_moe fused"), tmp_path / "source", **extra)
    assert problems_of(source.anatomy) == []
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, tmp_path / "out")
    assert load_tensors(tmp_path / "out")[name.format(0)] == 2
    with pytest.raises(UsageError, match="quantised experts cannot change their layout"):
        plan_layout(source.anatomy, "per-expert")


@pytest.mark.parametrize(("part", "shape"), [("weight_scale", (8, 1)), ("SCB", (8,)), ("weight_scale", (1,))])
def test_a_quantised_router_keeps_its_layout(stock: Stock, tmp_path: Path, part: str, shape: tuple[int, ...]) -> None:
    extra = {f"model.layers.{layer}.block_sparse_moe.gate.{part}": torch.ones(shape) for layer in range(4)}
    source = _with(stock("mixtral"), tmp_path / "source", **extra)
    with pytest.raises(UsageError, match="leave out --layout"):
        plan_layout(source.anatomy, "fused")


def _left(stock: Stock, tmp_path: Path, extra: dict[str, torch.Tensor]) -> Path:
    """Save what a prune makes of Qwen3-MoE and then put ``extra`` back, as a version did that passed it over."""
    source = open_subject(str(stock("qwen3_moe")))
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, tmp_path / "pruned")
    _saved(tmp_path / "pruned", tmp_path / "left", **extra)
    record = json.loads((tmp_path / "pruned" / "moesurgeon.json").read_text())
    for key in ("fingerprint", "config", "tensors"):
        record["history"][-1]["result"].pop(key, None)
    (tmp_path / "left" / "moesurgeon.json").write_text(json.dumps(record))
    return tmp_path / "left"


@pytest.mark.parametrize(
    ("part", "shape"),
    [("mlp.gate.weight_scale", (8, 1)), ("mlp.gate.SCB", (8,)), ("mlp.e_score_correction_bias", (8,))],
)
def test_what_was_left_by_name_does_not_verify(stock: Stock, tmp_path: Path, part: str, shape: tuple[int, ...]) -> None:
    name = f"model.layers.1.{part}"
    folder = _left(stock, tmp_path, {name: torch.ones(shape)})
    for source in (None, str(stock("qwen3_moe"))):
        with pytest.raises(OutputError, match=rf"{name} has shape \[8.*config.json counts 4 experts"):
            verify(str(folder), source)


@pytest.mark.parametrize(("part", "shape"), [("mlp.expert_usage_ema", (8,)), ("mlp.gate.weight_scale_inv", (2, 1))])
def test_what_was_left_by_shape_does_not_verify(
    stock: Stock, tmp_path: Path, part: str, shape: tuple[int, ...]
) -> None:
    name = f"model.layers.1.{part}"
    folder = _left(stock, tmp_path, {name: torch.ones(shape)})
    with pytest.raises(OutputError, match=rf"{name} has shape .* may still count the 8 experts of before"):
        verify(str(folder))


def test_a_shape_that_equals_the_new_count_by_chance_verifies(stock: Stock, tmp_path: Path) -> None:
    folder = _left(stock, tmp_path, {"model.layers.1.mlp.anything": torch.ones(4)})
    assert verify(str(folder))["tensors"]


@pytest.mark.parametrize("shape", [(128, 2), (16, 3)])
def test_what_may_follow_top_k_stops_a_retop(stock: Stock, tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.0.mlp.gate.tid2eid"
    source = _with(stock("qwen3_moe"), tmp_path / "source", **{name: torch.zeros(shape, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape .* may follow the top 2"):
        plan_retop(source.anatomy, RetopSpec(top_k=1))
    assert plan_retop(source.anatomy, RetopSpec(top_k=2)).changes_nothing


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek", "minimax_m2"])
def test_experts_of_several_dtypes_are_not_fused(stock: Stock, tmp_path: Path, name: str) -> None:
    tensors = {
        key: value.bfloat16() if ".experts.3." in key and ".1." not in key else value
        for key, value in load_tensors(stock(name)).items()
    }
    source = open_subject(str(save_tensors(tmp_path / "source", config_of(stock(name)), tensors)))
    with pytest.raises(UsageError, match=r"layer \d: its experts are stored in BF16 and F32 \(expert 3, .*: BF16\).*l"):
        plan_layout(source.anatomy, "fused")


def test_gates_and_downs_may_differ(stock: Stock, tmp_path: Path) -> None:
    """They are two tensors, each of one dtype."""
    tensors = {key: value.half() if ".w2." in key else value for key, value in load_tensors(stock("mixtral")).items()}
    source = open_subject(str(save_tensors(tmp_path / "source", config_of(stock("mixtral")), tensors)))
    apply(plan_layout(source.anatomy, "fused"), source.checkpoint, tmp_path / "out")
    back = open_subject(str(tmp_path / "out"))
    apply(plan_layout(back.anatomy, "per-expert"), back.checkpoint, tmp_path / "back")
    found = load_tensors(tmp_path / "back")
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
