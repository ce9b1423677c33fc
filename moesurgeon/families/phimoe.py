"""Phi-3.5-MoE: names of Mixtral, a router (sparsemixer) that takes two experts whatever the config says."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import HEAD_DIM, LLAMA_NORMS, Parts, attention
from moesurgeon.families.rules import RouterRule
from moesurgeon.families.stored import W1_W3_W2, both_layouts

PHIMOE = Family(
    name="phimoe",
    title="Phi-3.5-MoE",
    model_types=("phimoe",),
    experts_keys=("num_local_experts", "num_experts"),
    expert_width_key="intermediate_size",
    fixed_top_k=2,
    parts=(
        LLAMA_NORMS,
        *attention(bias="attention_bias"),
        Parts(names={f"{norm}.bias": "hidden_size" for norm in ("input_layernorm", "post_attention_layernorm")}),
        Parts(names={"model.norm.bias": "hidden_size"}, on="ends"),
        Parts(names={"lm_head.bias": "vocab_size"}, on="ends", when="lm_head_bias"),
    ),
    size_defaults=HEAD_DIM,
    router=RouterRule(scoring="sparsemixer", renormalise=False),
    layouts=both_layouts(
        {"{block}.gate.weight": 0},
        block="model.layers.{layer}.block_sparse_moe",
        projections=W1_W3_W2,
        running_block="model.layers.{layer}.mlp",
        running_rows={"{block}.router.weight": 0},
    ),
    router_module="router",
    not_run="its router (sparsemixer) is no function of scores and top-k",
)
