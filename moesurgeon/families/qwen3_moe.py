"""Qwen3-MoE: fine-grained experts without a shared one, renormalisation as the config says."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import DENSE_MLP, HEAD_DIM, LLAMA_NORMS, attention, head_norms
from moesurgeon.families.rules import MoeLayers, RouterRule
from moesurgeon.families.stored import both_layouts

QWEN3_MOE = Family(
    name="qwen3_moe",
    title="Qwen3-MoE",
    model_types=("qwen3_moe",),
    # The hub's files say num_experts, transformers 5 writes num_local_experts.
    experts_keys=("num_experts", "num_local_experts"),
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(dense_layers_key="mlp_only_layers", step_key="decoder_sparse_step"),
    parts=(LLAMA_NORMS, *attention(bias="attention_bias"), head_norms(), DENSE_MLP),
    size_defaults=HEAD_DIM,
    router=RouterRule(scoring="softmax", renormalise="norm_topk_prob"),
    layouts=both_layouts({"{block}.gate.weight": 0}),
)
