"""Small random checkpoints of every family, saved by stock transformers or made tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moesurgeon.checkpoint.open import open_checkpoint

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,  # wide, so that routers have opinions
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_GLM = {
    **{key: _DEEPSEEK[key] for key in ("n_routed_experts", "n_shared_experts", "moe_intermediate_size")},
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_key_value_heads": 2},
    "deepseek": {
        **{key: _DEEPSEEK[key] for key in ("n_routed_experts", "moe_intermediate_size", "first_k_dense_replace")},
        "n_shared_experts": 2,
    },
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": {**_DEEPSEEK, "num_nextn_predict_layers": 1},
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8},
    "flex_olmo": {"num_experts": 8},
    "glm4_moe": {**_GLM, "head_dim": 16, "num_nextn_predict_layers": 0},
    "glm4_moe_lite": {
        **{key: value for key, value in {**_DEEPSEEK, **_GLM}.items() if key != "first_k_dense_replace"},
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "dots1": {**_GLM},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    "minimax_m2": {"num_local_experts": 8, "head_dim": 16, "rotary_dim": 8},
    "jamba": {
        "num_experts": 8,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 16},
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "phimoe": {"num_local_experts": 8},
    "gpt_oss": {
        "num_local_experts": 8,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoe": {"num_local_experts": 8, "logits_scaling": 2.0},
    "granitemoeshared": {"num_local_experts": 8, "shared_intermediate_size": 48},
    "llama4_text": {
        "num_local_experts": 8,
        "intermediate_size_mlp": 80,
        "interleave_moe_layer_step": 2,
        "head_dim": 16,
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 32,
        "head_dim": 32,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "qk_rope_head_dim": 8,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "num_nextn_predict_layers": 0,
    },
}
# Every family in the layout that its checkpoints are published in, the relatives of one included.
MODEL_TYPES = tuple(FAMILIES)


ROUTERS = re.compile(r"\.(gate|wg|router|router\.layer)\.(weight|bias)$|e_score_correction_bias$|expert_bias$")


def stock_config(model_type: str, **overrides: Any) -> Any:
    import moesurgeon.engine.deepseek_v1  # noqa: F401 - registers "deepseek" with the Auto classes

    common: Mapping[str, Any] = COMMON
    if model_type == "dbrx":  # has names of its own, and takes no other
        common = {"vocab_size": COMMON["vocab_size"], "initializer_range": COMMON["initializer_range"]}
    return AutoConfig.for_model(model_type, **{**common, **FAMILIES[model_type], **overrides})


def random_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a model with random weights, router and selection bias included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(stock_config(model_type, **overrides), dtype=torch.float32)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if ROUTERS.search(name):
                tensor.data.normal_(std=0.3)
            elif name.endswith("_proj_bias"):
                tensor.data.normal_(std=0.1)
            elif name.endswith("tid2eid"):
                tensor.data.copy_(torch.stack([torch.randperm(8)[:2] for _ in range(len(tensor))]))
    return model.eval()


def save_checkpoint(
    folder: Path,
    model_type: str,
    *,
    fused: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Save a random model as stock transformers does, in shards."""
    model = random_model(model_type, seed, **overrides).to(dtype)
    model.save_pretrained(folder, save_original_format=not fused, max_shard_size="300KB")
    return folder


def save_tensors(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Save a checkpoint made by hand, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder by name, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


def put_nan(folder: Path, tensor: str) -> None:
    """Make the first value of a float32 tensor in ``folder`` no number."""
    stored = open_checkpoint(folder).tensors[tensor]
    with (folder / stored.shard).open("r+b") as file:
        file.seek(stored.offset)
        file.write(b"\x00\x00\xc0\x7f")
