"""Granite MoE, with a shared MLP or without: fused experts under names of their own."""

from moesurgeon.families.description import Family, Layout
from moesurgeon.families.parts import HEAD_DIM, LLAMA_NORMS, Parts, attention
from moesurgeon.families.rules import RouterRule

GRANITEMOE = Family(
    name="granitemoe",
    title="Granite MoE",
    model_types=("granitemoe", "granitemoeshared"),
    experts_keys=("num_local_experts", "num_experts"),
    expert_width_key="intermediate_size",
    parts=(
        LLAMA_NORMS,
        *attention(bias="attention_bias"),
        Parts(
            names={
                "shared_mlp.input_linear.weight": "2 * shared_intermediate_size, hidden_size",
                "shared_mlp.output_linear.weight": "hidden_size, shared_intermediate_size",
            },
            when="shared_intermediate_size",
        ),
    ),
    size_defaults=HEAD_DIM,
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
