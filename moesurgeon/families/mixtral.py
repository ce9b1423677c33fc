"""Mixtral: every layer a mixture, softmax over all experts, the chosen weights renormalised."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import HEAD_DIM, LLAMA_NORMS, attention
from moesurgeon.families.rules import RouterRule
from moesurgeon.families.stored import W1_W3_W2, both_layouts

MIXTRAL = Family(
    name="mixtral",
    title="Mixtral",
    model_types=("mixtral",),
    experts_keys=("num_local_experts", "num_experts"),
    expert_width_key="intermediate_size",
    parts=(LLAMA_NORMS, *attention()),
    size_defaults=HEAD_DIM,
    router=RouterRule(scoring="softmax", renormalise=True),
    layouts=both_layouts(
        {"{block}.gate.weight": 0},
        block="model.layers.{layer}.block_sparse_moe",
        projections=W1_W3_W2,
        running_block="model.layers.{layer}.mlp",
    ),
)
