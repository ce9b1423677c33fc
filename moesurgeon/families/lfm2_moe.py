"""LFM2-MoE: short convolutions and attention, sigmoid scores, a bias that lives on the block."""

from moesurgeon.families.description import Family
from moesurgeon.families.rules import MoeLayers, RouterRule
from moesurgeon.families.stored import W1_W3_W2, both_layouts

LFM2_MOE = Family(
    name="lfm2_moe",
    title="LFM2-MoE",
    model_types=("lfm2_moe",),
    experts_keys=("num_experts",),
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(first_dense_key="num_dense_layers", defaults={"num_dense_layers": 2}),
    attention=("model.layers.{layer}.self_attn.", "model.layers.{layer}.conv."),
    final_norm="model.embedding_norm.weight",
    tied_by_default=True,
    router=RouterRule(
        scoring="sigmoid",
        renormalise="norm_topk_prob",
        renormalise_default=True,
        epsilon=1e-6,
        scale_key="routed_scaling_factor",
        selection_bias=True,
    ),
    layouts=both_layouts(
        {"{block}.gate.weight": 0, "{block}.expert_bias": 0},
        block="model.layers.{layer}.feed_forward",
        projections=W1_W3_W2,
    ),
    block_module="model.layers.{layer}.feed_forward",
    bias_module="expert_bias",
)
