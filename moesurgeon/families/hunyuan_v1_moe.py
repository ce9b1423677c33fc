"""Hunyuan: one shared MLP, always renormalised, experts per token as a number or a list of one per layer."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import HEAD_DIM, LLAMA_NORMS, attention, head_norms, mlp
from moesurgeon.families.rules import RouterRule
from moesurgeon.families.stored import both_layouts

HUNYUAN_V1_MOE = Family(
    name="hunyuan_v1_moe",
    title="Hunyuan",
    model_types=("hunyuan_v1_moe",),
    experts_keys=("num_experts", "num_local_experts"),
    top_k_keys=("moe_topk", "num_experts_per_tok"),
    expert_width_key="intermediate_size",
    parts=(
        LLAMA_NORMS,
        *attention(bias="attention_bias"),
        head_norms("query_layernorm", "key_layernorm"),
        mlp("{block}.shared_mlp", "intermediate_size", on="moe"),
    ),
    size_defaults=HEAD_DIM,
    router=RouterRule(scoring="softmax", renormalise=True),
    layouts=both_layouts({"{block}.gate.wg.weight": 0}, shared="{block}.shared_mlp."),
    not_run="its router is a layer inside the gate, which moesurgeon cannot train yet",
)
