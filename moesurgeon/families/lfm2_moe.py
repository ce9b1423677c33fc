"""LFM2-MoE: short convolutions and attention, sigmoid scores, a bias that lives on the block."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import HEAD_DIM, Parts, attention, head_norms, mlp, norms
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
    parts=(
        Parts(names=norms("operator_norm", "ffn_norm")),
        *attention("out_proj", on="has:self_attn."),
        head_norms("q_layernorm", "k_layernorm", on="has:self_attn."),
        Parts(
            names={
                "conv.conv.weight": "hidden_size, 1, conv_L_cache",
                "conv.in_proj.weight": "3 * hidden_size, hidden_size",
                "conv.out_proj.weight": "hidden_size, hidden_size",
            },
            on="has:conv.",
        ),
        Parts(
            names={
                "conv.conv.bias": "hidden_size",
                "conv.in_proj.bias": "3 * hidden_size",
                "conv.out_proj.bias": "hidden_size",
            },
            on="has:conv.",
            when="conv_bias",
        ),
        mlp("{block}", "intermediate_size", on="dense", names=("w1", "w3", "w2")),
    ),
    size_defaults={**HEAD_DIM, "conv_L_cache": 3},
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
