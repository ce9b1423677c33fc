"""Mixtral: every layer a mixture, softmax over all experts, the chosen weights renormalised."""

from moesurgeon.families.description import Family, Layout, RouterRule

MIXTRAL = Family(
    name="mixtral",
    title="Mixtral",
    model_types=("mixtral",),
    experts_keys=("num_local_experts", "num_experts"),
    expert_width_key="intermediate_size",
    router=RouterRule(scoring="softmax", renormalise=True),
    layouts=(
        Layout(
            name="per-expert",
            block="model.layers.{layer}.block_sparse_moe",
            per_expert_rows={"{block}.gate.weight": 0},
            expert="{block}.experts.{expert}.",
            projections={"gate": "w1", "up": "w3", "down": "w2"},
        ),
        # What transformers 5 writes with save_original_format=False: its own names in memory.
        Layout(
            name="fused",
            block="model.layers.{layer}.mlp",
            per_expert_rows={"{block}.gate.weight": 0},
            projections={"gate_up": "gate_up_proj", "down": "down_proj"},
        ),
    ),
)
