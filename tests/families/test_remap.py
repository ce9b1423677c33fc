"""DeepSeek-MoE v1 written as Qwen2-MoE: the same function, or a refusal that says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.errors import OutputError, UsageError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, save_checkpoint
from tests.families.running import load_stock, logits_of


def _edited(folder: Path, **config: Any) -> Subject:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | config))
    return open_subject(str(folder))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"norm_topk_prob": True},
        {"norm_topk_prob": True, "num_experts_per_tok": 1},  # v1 leaves a single weight as it is
        {"first_k_dense_replace": 2, "n_shared_experts": 1},
        {"first_k_dense_replace": 0},
        {"tie_word_embeddings": True},
    ],
)
def test_it_computes_the_same(tmp_path: Path, config: dict[str, Any]) -> None:
    source = open_subject(str(save_checkpoint(tmp_path / "source", "deepseek", **config)))
    apply(plan_layout(source.anatomy, "qwen2-moe"), source.checkpoint, tmp_path / "out")
    written = open_subject(str(tmp_path / "out"))
    assert written.anatomy.family.name == "qwen2_moe"
    assert written.anatomy.renormalises is source.anatomy.renormalises
    assert written.anatomy.moe_layers == source.anatomy.moe_layers
    model = load_stock(tmp_path / "out")
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    difference = (logits_of(model) - logits_of(load_stock(source.root))).abs().max()
    # Equal to the last bit but where v1 adds 1e-20 to the sum of the weights.
    assert difference <= (1e-5 if config.get("norm_topk_prob") else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_of_zeros_change_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """vLLM's Qwen2-MoE has query, key and value biases whatever the config says; transformers goes by qkv_bias."""
    source = open_subject(str(save_checkpoint(tmp_path / "source", "deepseek", dtype=dtype)))
    for name, biases in (("with", True), ("without", False)):
        plan = plan_layout(source.anatomy, "qwen2-moe", biases=biases)
        apply(plan, source.checkpoint, tmp_path / name)
        assert config_of(tmp_path / name)["qkv_bias"] is biases
        assert verify(str(tmp_path / name), str(source.root))["tensors_replaced"] == 0
    one, other = (load_tensors(tmp_path / name) for name in ("with", "without"))
    added = one.keys() - other.keys()
    assert added == {f"model.layers.{n}.self_attn.{p}_proj.bias" for n in range(4) for p in "qkv"}
    assert all(one[name].dtype == dtype and not one[name].any() for name in added)
    with_them, without = (load_stock(tmp_path / name).to(dtype) for name in ("with", "without"))
    assert torch.equal(logits_of(with_them), logits_of(without))


def test_a_bias_that_is_no_zero_any_more_does_not_verify(tmp_path: Path) -> None:
    source = open_subject(str(save_checkpoint(tmp_path / "source", "deepseek")))
    apply(plan_layout(source.anatomy, "qwen2-moe"), source.checkpoint, tmp_path / "out")
    tensor = open_subject(str(tmp_path / "out")).checkpoint.tensors["model.layers.1.self_attn.k_proj.bias"]
    with (tmp_path / "out" / tensor.shard).open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\x01")
    with pytest.raises(OutputError, match=r"k_proj\.bias differs from"):
        verify(str(tmp_path / "out"), str(source.root))


def test_what_an_earlier_version_wrote_without_biases_still_verifies(tmp_path: Path) -> None:
    source = open_subject(str(save_checkpoint(tmp_path / "source", "deepseek")))
    apply(plan_layout(source.anatomy, "qwen2-moe", biases=False), source.checkpoint, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "moesurgeon.json").read_text())
    assert record["history"][-1]["operations"] == [{"operation": "layout", "layout": "qwen2-moe"}]
    assert verify(str(tmp_path / "out"), str(source.root))["tensors_equal"]


def test_the_fused_layout_goes_the_same_way(stock: Stock, tmp_path: Path) -> None:
    for name in ("deepseek", "deepseek fused"):
        source = open_subject(str(stock(name)))
        apply(plan_layout(source.anatomy, "qwen2-moe"), source.checkpoint, tmp_path / name)
    one, other = (load_tensors(tmp_path / name) for name in ("deepseek", "deepseek fused"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_either_name_of_the_expert_count_will_do(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "source", "deepseek")
    config = config_of(folder)
    config["num_experts"] = config.pop("n_routed_experts")
    (folder / "config.json").write_text(json.dumps(config))
    source = open_subject(str(folder))
    apply(plan_layout(source.anatomy, "qwen2-moe"), source.checkpoint, tmp_path / "out")
    assert config_of(tmp_path / "out")["num_experts"] == 8


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"scoring_func": "sigmoid"}, "its gate is no softmax"),
        ({"attention_bias": True}, "its attention has biases"),
        ({"mlp_bias": True}, "its MLPs have biases"),
        ({"n_shared_experts": 0}, "it has no shared experts"),
        ({"n_shared_experts": None}, "it has no shared experts"),
    ],
)
def test_what_qwen2_moe_cannot_say_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    biased = {key: True for key in config if key.endswith("bias")}  # else it lacks them
    source = _edited(save_checkpoint(tmp_path, "deepseek", **biased), **config)
    with pytest.raises(UsageError, match=says):
        plan_layout(source.anatomy, "qwen2-moe")


def test_mixtures_in_every_other_layer_are_refused(tmp_path: Path) -> None:
    source = open_subject(str(save_checkpoint(tmp_path, "deepseek", moe_layer_freq=2)))
    assert source.anatomy.moe_layers == (2,)
    with pytest.raises(UsageError, match="not in every layer after the first dense ones"):
        plan_layout(source.anatomy, "qwen2-moe")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_other_families_have_no_such_layout(stock: Stock, name: str) -> None:
    anatomy = open_subject(str(stock(name))).anatomy
    with pytest.raises(UsageError, match=r"is a layout for DeepSeek-MoE v1, not for"):
        plan_layout(anatomy, "qwen2-moe")
    with pytest.raises(UsageError, match=r"has no layout 'flat'; it has per-expert, fused"):
        plan_layout(anatomy, "flat")


@pytest.mark.parametrize("name", ["deepseek_v3 fp8", "mixtral mxfp4"])
def test_quantised_experts_keep_their_layout(stock: Stock, name: str) -> None:
    anatomy = open_subject(str(stock(name))).anatomy
    assert plan_layout(anatomy, anatomy.layout.name).changes_nothing
    other = "fused" if anatomy.layout.name == "per-expert" else "per-expert"
    with pytest.raises(UsageError, match="quantised experts cannot change their layout"):
        plan_layout(anatomy, other)
