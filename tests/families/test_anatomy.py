"""What is recognised in a checkpoint of every family is what the stock model has."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.runtime.cost import count_flops, count_parameters
from tests.families.conftest import Stock
from tests.families.factory import MODEL_TYPES, ROUTERS, config_of, load_tensors, save_tensors, stock_config
from tests.families.running import load_stock


@pytest.mark.parametrize("name", [*MODEL_TYPES, "deepseek_v4 saved", "deepseek_v4 fused"])
def test_the_anatomy_is_that_of_the_running_model(stock: Stock, name: str) -> None:
    anatomy = open_subject(str(stock(name))).anatomy  # complete
    model = load_stock(stock(name))
    found = {n: model.get_submodule(anatomy.family.block_module.replace("{layer}", str(n))) for n in range(4)}
    blocks = {n: block for n, block in found.items() if hasattr(block, anatomy.family.experts_module)}
    assert list(anatomy.moe_layers) == list(blocks)
    for block in blocks.values():
        router = block.get_submodule(anatomy.family.router_module)
        assert tuple(next(router.parameters()).shape) == (anatomy.experts, anatomy.hidden) == (8, 64)
        assert getattr(router, "top_k", 2) == anatomy.top_k == 2
    # (Qwen2-MoE's gate on its shared expert is of no expert: one row, whatever their number.)
    others = [name for name, role in anatomy.roles.items() if role.kind == "other" and "shared_expert_gate" not in name]
    assert not [tensor for tensor in others if re.search("expert|router", tensor) or ROUTERS.search(tensor)]


@pytest.mark.parametrize("name", [*MODEL_TYPES, "deepseek_v4 saved", "deepseek_v4 fused"])
def test_parameters_and_flops_are_the_stock_models(stock: Stock, name: str) -> None:
    anatomy = open_subject(str(stock(name))).anatomy
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock_config(name.split(maxsplit=1)[0]))
    sizes = {key: tensor for key, tensor in model.named_parameters()} | {
        key: tensor for key, tensor in model.named_buffers() if key.endswith(("e_score_correction_bias", "expert_bias"))
    }
    routed = {key: tensor for key, tensor in sizes.items() if ".experts." in key}
    matrices = sum(tensor.numel() for key, tensor in routed.items() if not key.endswith("bias"))
    found, flops = count_parameters(anatomy), count_flops(anatomy)
    assert found.total == sum(tensor.numel() for tensor in sizes.values())
    assert found.experts == sum(tensor.numel() for tensor in routed.values())
    assert found.active == found.total - found.experts * 3 // 4  # top 2 of 8
    assert flops.routed_experts == 2 * matrices // 4
    assert flops.head == 2 * 128 * 64
    assert flops.router == 2 * 8 * 64 * len(anatomy.moe_layers)
    assert flops.attention > 0
    names = "|".join(("shared_expert", "shared_mlp", "shared_experts"))
    shared = sum(t.numel() for key, t in sizes.items() if re.search(names, key) and t.dim() > 1)
    assert flops.shared_experts == 2 * shared
    ends = {"embed_tokens", "wte"}
    all_matrices = sum(
        t.numel() for key, t in sizes.items() if t.dim() > 1 and not ends & set(key.split(".")) and key not in routed
    )
    biases = sum(t.numel() for key, t in sizes.items() if key.endswith("e_score_correction_bias") and t.dim() > 1)
    tied = 0 if any("lm_head" in key for key in sizes) else 128 * 64
    streams = sum(t.numel() for key, t in sizes.items() if "model.hc_head" in key and t.dim() > 1)
    assert flops.total - flops.routed_experts == 2 * (all_matrices + tied - biases - streams)


@pytest.mark.parametrize(
    ("name", "stray"),
    [
        ("qwen3_moe", "mtp.layers.0.mlp.experts.0.up_proj.weight"),
        ("qwen3_moe", "mtp.layers.0.mlp.gate.weight"),
        ("qwen3_moe fused", "mtp.layers.0.mlp.experts.gate_up_proj"),
        ("granitemoe", "mtp.0.block_sparse_moe.input_linear.weight"),
        ("dbrx", "mtp.0.ffn.router.layer.weight"),
        ("deepseek_v4", "nextn.0.ffn.gate.tid2eid"),
        ("deepseek_v4", "mtp.layers.0.ffn.gate.weight"),
    ],
)
def test_experts_of_layers_that_nobody_described_are_not_overlooked(
    stock: Stock, tmp_path: Path, name: str, stray: str
) -> None:
    tensors = {**load_tensors(stock(name)), stray: torch.zeros(32, 64)}
    with pytest.raises(CheckpointError, match=f"{stray} belongs to the experts"):
        open_subject(str(save_tensors(tmp_path, config_of(stock(name)), tensors)))
