"""ERNIE 4.5: softmax scores, chosen with a bias of shape [1, E], always renormalised."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import DENSE_MLP, HEAD_DIM, LLAMA_NORMS, Parts, attention, mlp, mlp_biases
from moesurgeon.families.rules import MoeLayers, RouterRule
from moesurgeon.families.stored import both_layouts

_SHARED_WIDTH = "moe_num_shared_experts * moe_intermediate_size"

ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    title="ERNIE 4.5",
    model_types=("ernie4_5_moe",),
    experts_keys=("moe_num_experts", "num_experts"),
    top_k_keys=("moe_k", "num_experts_per_tok"),
    shared_key="moe_num_shared_experts",
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(
        first_dense_key="moe_layer_start_index",
        last_key="moe_layer_end_index",
        step_key="moe_layer_interval",
        defaults={"moe_layer_start_index": 1},
    ),
    mtp_layer=(
        "model.mtp_block.{layer}",
        "model.mtp_emb_norm.{layer}",
        "model.mtp_hidden_norm.{layer}",
        "model.mtp_linear_proj.{layer}",
    ),
    tied_by_default=True,
    parts=(
        LLAMA_NORMS,
        *attention(bias="use_bias"),
        DENSE_MLP,
        mlp("{block}.shared_experts", _SHARED_WIDTH, on="moe", when="moe_num_shared_experts"),
        mlp_biases("{block}", "intermediate_size", on="dense", when="use_bias"),
        mlp_biases("{block}.shared_experts", _SHARED_WIDTH, on="moe", when="moe_num_shared_experts, use_bias"),
        Parts(names={"lm_head.bias": "vocab_size"}, on="ends", when="use_bias"),
    ),
    size_defaults=HEAD_DIM,
    router=RouterRule(scoring="softmax", renormalise=True, selection_bias=True),
    layouts=both_layouts(
        {"{block}.gate.weight": 0, "{block}.moe_statics.e_score_correction_bias": 1},
        shared="{block}.shared_experts.",
        running_rows={"{block}.gate.weight": 0, "{block}.gate.moe_statics.e_score_correction_bias": 1},
    ),
    bias_module="gate.moe_statics.e_score_correction_bias",
)
