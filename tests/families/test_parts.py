"""The lists of what layers hold are those of stock transformers: no name more or less, and every shape."""

from pathlib import Path
from typing import Any

import pytest

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.surgery.anatomy import Anatomy, examine
from moesurgeon.surgery.completeness import problems_of
from moesurgeon.surgery.expected import expected_in, unexpected_tensors
from tests.families.conftest import Stock
from tests.families.factory import MODEL_TYPES, save_checkpoint

LISTED = [name for name in MODEL_TYPES if name != "deepseek_v4"]
FUSED = ("mixtral", "deepseek", "qwen2_moe", "ernie4_5_moe", "minimax_m2", "jamba", "lfm2_moe", "phimoe")
OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"head_dim": 24, "tie_word_embeddings": True}),
    ("deepseek", {"attention_bias": True, "n_shared_experts": None}),
    ("deepseek_v2", {"q_lora_rank": None, "v_head_dim": 24}),
    ("deepseek", {"mlp_bias": True}),
    ("deepseek_v2", {"mlp_bias": True, "attention_bias": True}),
    ("deepseek_v3", {"q_lora_rank": None, "n_shared_experts": 3}),
    ("qwen2_moe", {"qkv_bias": False, "num_key_value_heads": 2}),
    ("qwen3_moe", {"attention_bias": True, "head_dim": 32, "num_key_value_heads": 2, "mlp_only_layers": [0, 2]}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
    ("glm4_moe_lite", {"q_lora_rank": None}),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    ("ernie4_5_moe", {"use_bias": True}),
    ("jamba", {"mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_expand": 3}),
    ("lfm2_moe", {"conv_bias": True, "conv_L_cache": 5}),
    ("gpt_oss", {"attention_bias": False}),
    ("granitemoeshared", {"shared_intermediate_size": 0}),
    ("olmoe", {"attention_bias": True, "num_key_value_heads": 2}),
]


def _anatomy(folder: Path) -> Anatomy:
    checkpoint = open_checkpoint(folder)
    return examine(checkpoint.config, checkpoint.tensors)


def _is_exact(anatomy: Anatomy) -> None:
    """Every tensor outside experts and routers is expected with its very shape, and there is no other."""
    assert problems_of(anatomy) == [] and unexpected_tensors(anatomy) == []
    for layer in range(anatomy.layers):
        prefix = anatomy.name_in(layer, anatomy.family.layer) + "."
        stored = {
            name.removeprefix(prefix): anatomy.tensors[name].shape
            for name in anatomy.by_layer[layer]
            if anatomy.roles[name].kind in ("other", "shared")
        }
        assert expected_in(anatomy, layer) == stored


@pytest.mark.parametrize("name", [*LISTED, *(f"{name} fused" for name in FUSED)])
def test_the_list_is_what_transformers_saves(stock: Stock, name: str) -> None:
    _is_exact(_anatomy(stock(name)))


@pytest.mark.parametrize(("name", "config"), OTHERWISE)
def test_the_list_follows_the_config(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    _is_exact(_anatomy(save_checkpoint(tmp_path / "other", name, **config)))


@pytest.mark.parametrize("name", ["deepseek_v3 fp8", "mixtral mxfp4", "deepseek_v3 mtp", "ernie4_5_moe mtp"])
def test_quantised_and_predicting_ones_are_whole(stock: Stock, name: str) -> None:
    anatomy = _anatomy(stock(name))
    assert problems_of(anatomy) == [] and unexpected_tensors(anatomy) == []


@pytest.mark.parametrize("name", LISTED)
def test_each_tensor_is_missed_and_each_shape_is_held(stock: Stock, name: str) -> None:
    whole = _anatomy(stock(name))
    for gone, spec in whole.tensors.items():
        if whole.roles[gone].kind not in ("other", "shared"):
            continue
        rest = {name: spec for name, spec in whole.tensors.items() if name != gone}
        other = {**whole.tensors, gone: TensorSpec(gone, spec.dtype, (*spec.shape[:-1], spec.shape[-1] + 1))}
        match = whole.family.layer_pattern.fullmatch(gone)
        last = gone.removeprefix(whole.name_in(int(match["layer"]), whole.family.layer) + ".") if match else gone
        for damaged in (rest, other):
            assert any(last in problem for problem in problems_of(examine(whole.config, damaged))), gone


@pytest.mark.parametrize("suffixes", [("qweight", "qzeros", "scales", "g_idx"), ("weight_packed", "weight_scale")])
def test_quantised_attention_is_there_under_other_names(stock: Stock, suffixes: tuple[str, ...]) -> None:
    whole = _anatomy(stock("qwen3_moe"))
    tensors: dict[str, TensorSpec] = {}
    for name, spec in whole.tensors.items():
        if "_proj.weight" in name and "self_attn" in name:
            module = name.removesuffix("weight")
            tensors |= {module + suffix: TensorSpec(module + suffix, "I32", (8, 8)) for suffix in suffixes}
        else:
            tensors[name] = spec
    anatomy = examine({**whole.config, "quantization_config": {"quant_method": "gptq"}}, tensors)
    assert problems_of(anatomy) == [] and unexpected_tensors(anatomy) == []
    for suffix in suffixes:
        tensors.pop(f"model.layers.1.self_attn.q_proj.{suffix}")
    assert problems_of(examine(anatomy.config, tensors)) == [
        "layer 1 lacks self_attn.q_proj.weight; a shard is missing or was cut"
    ]


def test_what_all_layers_lack_is_said_once(stock: Stock) -> None:
    whole = _anatomy(stock("mixtral"))
    tensors = {name: spec for name, spec in whole.tensors.items() if "self_attn.q_proj" not in name}
    assert problems_of(examine(whole.config, tensors)) == [
        "4 layers (0, 1, 2, 3) lack self_attn.q_proj.weight; a shard is missing or was cut"
    ]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("vocab_size", 256, "model.embed_tokens.weight has shape [128, 64], config.json makes it [256, 64]"),
        ("num_attention_heads", 8, "self_attn.q_proj.weight has shape"),
        ("num_key_value_heads", 1, "self_attn.k_proj.weight has shape"),
    ],
)
def test_sizes_that_contradict_are_named(stock: Stock, key: str, value: int, says: str) -> None:
    whole = _anatomy(stock("qwen3_moe"))
    assert any(says in problem for problem in problems_of(examine({**whole.config, key: value}, whole.tensors)))


def test_a_bias_that_nobody_asked_for_is_unexpected(stock: Stock) -> None:
    whole = _anatomy(stock("mixtral"))
    extra = {name: TensorSpec(name, "F32", (64,)) for name in ("model.layers.2.self_attn.q_proj.bias",)}
    assert unexpected_tensors(examine(whole.config, {**whole.tensors, **extra})) == [*extra]
    harmless = "model.layers.2.self_attn.rotary_emb.inv_freq"
    anatomy = examine(whole.config, {**whole.tensors, harmless: TensorSpec(harmless, "F32", (8,))})
    assert unexpected_tensors(anatomy) == []
