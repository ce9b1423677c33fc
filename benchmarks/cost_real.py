"""Checkpoints whose healing ``heal_cost.py`` projects, from their configs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.healing.pace import Pace

LENGTH, TOKENS, HELDOUT = 512, 98304, 16384
"""Of a window, to heal on and to judge on: the command's own defaults."""


@dataclass(frozen=True, kw_only=True)
class Real:
    """A checkpoint after the cut: of an expert its width and its share of the tokens, and the rank to project for."""

    made: Callable[[], tuple[dict[str, Any], list[TensorSpec]]]
    hidden: int
    width: int
    share: float
    rank: int


def work_account(job: dict[str, Any]) -> dict[str, Any]:
    """Return what healing takes for a real config, its model built without weights; and what FLOPs follow from."""
    import numpy as np
    import torch

    from moesurgeon.engine.batches import to_batch
    from moesurgeon.engine.destinations import Destinations
    from moesurgeon.engine.device import Placement
    from moesurgeon.engine.skeleton import build_skeleton
    from moesurgeon.engine.streams import Source, Stream
    from moesurgeon.healing.memory import healing_bytes
    from moesurgeon.runtime.cost import count_flops
    from moesurgeon.surgery.anatomy import examine
    from moesurgeon.traces.windows import Window

    config, tensors = REAL[job["name"]].made()
    anatomy = examine(config, {spec.name: spec for spec in tensors})
    device = torch.device("cpu")
    skeleton = build_skeleton(anatomy, torch.bfloat16, device)
    source = Source(anatomy, Placement(device, torch.bfloat16), skeleton, Destinations({}, (1, 1)), None)
    window = Window("text", 0, 0, np.zeros(LENGTH, np.int32))
    batches = [to_batch([window], device)] * ((TOKENS + HELDOUT) // LENGTH)
    takes = healing_bytes(Stream(source), job["method"], Pace(rank=job["rank"]), batches)
    flops, layers = count_flops(anatomy), len(anatomy.moe_layers)
    kept, wide = anatomy.experts, anatomy.expert_width
    parts = [(wide, anatomy.top_k / kept)] * kept
    shared = config.get("n_shared_experts") or 0
    if shared:
        parts.append((shared * wide, 1.0))
    other = (flops.attention + flops.router + flops.dense_mlp) // layers
    size = {"hidden": anatomy.hidden, "parts": parts, "other": other}
    return {"work": takes.copy + takes.work, "held": takes.held, "layers": layers, "size": size}


def mixtral() -> tuple[dict[str, Any], list[TensorSpec]]:
    """Mixtral-8x7B with 6 of its 8 experts."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 6, "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = list(_ends(32000, 4096))
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        tensors += _attention(prefix, 4096, 1024)
        tensors.append(_spec(f"{prefix}block_sparse_moe.gate.weight", 6, 4096))
        for expert in range(6):
            names = (f"{prefix}block_sparse_moe.experts.{expert}.{each}.weight" for each in ("w1", "w3", "w2"))
            tensors += _gated(names, 4096, 14336)
    return config, tensors


def deepseek() -> tuple[dict[str, Any], list[TensorSpec]]:
    """DeepSeek-MoE-16B with 48 of its 64 experts."""
    config = {
        "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_routed_experts": 48, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
        "vocab_size": 102400, "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = list(_ends(102400, 2048))
    for layer in range(28):
        prefix = f"model.layers.{layer}."
        tensors += _attention(prefix, 2048, 2048)
        blocks = {"mlp.": 10944} if layer == 0 else {f"mlp.experts.{each}.": 1408 for each in range(48)}
        if layer:
            tensors.append(_spec(f"{prefix}mlp.gate.weight", 48, 2048))
            blocks["mlp.shared_experts."] = 2816
        for block, wide in blocks.items():
            names = (f"{prefix}{block}{each}_proj.weight" for each in ("gate", "up", "down"))
            tensors += _gated(names, 2048, wide)
    return config, tensors


def _spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "BF16", shape)


def _ends(vocabulary: int, high: int) -> list[TensorSpec]:
    ends = ("model.embed_tokens.weight", (vocabulary, high)), ("model.norm.weight", (high,))
    return [_spec(name, *shape) for name, shape in (*ends, ("lm_head.weight", (vocabulary, high)))]


def _attention(prefix: str, high: int, keys: int) -> list[TensorSpec]:
    inner = {"q": (high, high), "k": (keys, high), "v": (keys, high), "o": (high, high)}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": shape for name, shape in inner.items()}
    shapes |= {"input_layernorm": (high,), "post_attention_layernorm": (high,)}
    return [_spec(f"{prefix}{name}.weight", *shape) for name, shape in shapes.items()]


def _gated(names: Any, high: int, wide: int) -> list[TensorSpec]:
    return [_spec(name, *shape) for name, shape in zip(names, ((wide, high), (wide, high), (high, wide)), strict=True)]


REAL = {
    "Mixtral-8x7B": Real(made=mixtral, hidden=4096, width=14336, share=2 / 6, rank=1024),
    "DeepSeek-MoE-16B": Real(made=deepseek, hidden=2048, width=1408, share=6 / 48, rank=256),
}
