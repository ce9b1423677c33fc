"""Qwen2-MoE: one shared expert behind a sigmoid gate, renormalisation as the config says.

Also the stock home of DeepSeek-MoE v1 checkpoints (``--layout qwen2-moe``).
"""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import DENSE_MLP, HEAD_DIM, LLAMA_NORMS, Parts, attention, mlp
from moesurgeon.families.rules import MoeLayers, RouterRule
from moesurgeon.families.stored import both_layouts

QWEN2_MOE = Family(
    name="qwen2_moe",
    title="Qwen2-MoE",
    model_types=("qwen2_moe",),
    experts_keys=("num_experts",),
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(dense_layers_key="mlp_only_layers", step_key="decoder_sparse_step"),
    parts=(
        LLAMA_NORMS,
        *attention(bias="qkv_bias", out_bias=False),
        DENSE_MLP,
        mlp("{block}.shared_expert", "shared_expert_intermediate_size", on="moe"),
        Parts(names={"{block}.shared_expert_gate.weight": "1, hidden_size"}, on="moe"),
    ),
    size_defaults={**HEAD_DIM, "qkv_bias": True},
    router=RouterRule(scoring="softmax", renormalise="norm_topk_prob"),
    layouts=both_layouts(
        {"{block}.gate.weight": 0}, shared="{block}.shared_expert.", whole=("{block}.shared_expert_gate.",)
    ),
)
