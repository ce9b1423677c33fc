"""Families that compute the same function under other names, so that a result loads elsewhere.

DeepSeek-MoE v1 as Qwen2-MoE: exact, because Qwen2-MoE differs only in a sigmoid gate on its shared
expert. That gate with zero weights is 0.5 everywhere, and the shared expert's down projection times
two undoes it without rounding. (The router's softmax is then taken in float32 instead of the model's
dtype; in float32 the two agree, in bfloat16 near ties may fall differently.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moesurgeon.errors import UsageError
from moesurgeon.families.deepseek import DEEPSEEK_V1
from moesurgeon.families.description import Family
from moesurgeon.families.keys import count_of
from moesurgeon.families.qwen2_moe import QWEN2_MOE


@dataclass(frozen=True, kw_only=True)
class Remap:
    """``config``: from the old config to (values to set, keys to remove); UsageError if impossible.

    ``doubled`` is the shared expert's projection to multiply by two, ``zero_gate`` the name of the
    gate [1, H] to add, in place of ``{block}`` the MoE block. ``zero_biases``: projections of every layer that get
    biases of zeros, with ``bias_key`` true: vLLM's Qwen2-MoE has them whatever the config says, and computes NaN
    where none are stored.
    """

    layout: str
    source: Family
    target: Family
    doubled: str
    zero_gate: str
    zero_biases: tuple[str, ...]
    bias_key: str
    config: Callable[[Mapping[str, Any]], tuple[dict[str, Any], tuple[str, ...]]]


_LEVELS = ("text_config", "llm_config", "language_config")


def _qwen2_moe_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    shared = count_of(config, "n_shared_experts", 0)
    for fits, problem in (
        (config.get("scoring_func", "softmax") == "softmax", "its gate is no softmax"),
        (not any(config.get(key) for key in _LEVELS), "its config has the text model inside another"),
        (not config.get("attention_bias"), "its attention has biases"),
        (not config.get("mlp_bias"), "its MLPs have biases"),
        (
            count_of(config, "moe_layer_freq", 1) in (0, 1),
            "its mixtures are not in every layer after the first dense ones",
        ),
        (shared > 0, "it has no shared experts"),
        (not isinstance(config.get("num_experts_per_tok"), list), "its layers differ in their experts per token"),
        (not isinstance(config.get("moe_intermediate_size"), list), "its layers differ in the width of their experts"),
    ):
        if not fits:
            raise UsageError(f"this checkpoint cannot be written as Qwen2-MoE: {problem}; leave out --layout")
    experts = next(config[key] for key in DEEPSEEK_V1.experts_keys if config.get(key) is not None)
    top_k = int(config["num_experts_per_tok"])
    width = int(config["moe_intermediate_size"])
    values = {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": experts,
        # v1 never renormalises a single weight, Qwen2-MoE would.
        "norm_topk_prob": bool(config.get("norm_topk_prob")) and top_k > 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(count_of(config, "first_k_dense_replace", 0))),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width * shared,
        "router_aux_loss_coef": config.get("aux_loss_alpha", 0.001),
        "use_sliding_window": False,
    }
    removed = (
        "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq", "scoring_func",
        "aux_loss_alpha", "seq_aux", "auto_map",
    )  # fmt: skip
    return values, tuple(key for key in removed if key in config)


REMAPS: tuple[Remap, ...] = (
    Remap(
        layout="qwen2-moe",
        source=DEEPSEEK_V1,
        target=QWEN2_MOE,
        doubled="down_proj.weight",
        zero_gate="{block}.shared_expert_gate.weight",
        zero_biases=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        bias_key="qkv_bias",
        config=_qwen2_moe_config,
    ),
)
