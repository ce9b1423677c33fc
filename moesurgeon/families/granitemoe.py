"""Granite MoE, with a shared MLP or without: fused experts under names of their own."""

from moesurgeon.families.description import Family, Layout
from moesurgeon.families.rules import RouterRule

GRANITEMOE = Family(
    name="granitemoe",
    title="Granite MoE",
    model_types=("granitemoe", "granitemoeshared"),
    experts_keys=("num_local_experts", "num_experts"),
    expert_width_key="intermediate_size",
    # The softmax of the chosen logits is the softmax of all, renormalised.
    router=RouterRule(scoring="softmax", renormalise=True),
    layouts=(
        Layout(
            name="fused",
            block="model.layers.{layer}.block_sparse_moe",
            per_expert_rows={"{block}.router.layer.weight": 0},
            fused="{block}.",
            projections={"gate_up": "input_linear", "down": "output_linear"},
            shared="model.layers.{layer}.shared_mlp.",
        ),
    ),
    running=Layout(
        name="fused",
        block="model.layers.{layer}.block_sparse_moe",
        per_expert_rows={"{block}.router.weight": 0},
        projections={"gate_up": "gate_up_proj", "down": "down_proj"},
        shared="model.layers.{layer}.shared_mlp.",
    ),
    block_module="model.layers.{layer}.block_sparse_moe",
    router_module="router",
    trained_since="5.23",
)
