"""MiniMax-M2: sigmoid scores, chosen with a bias that lives on the block, always renormalised."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import LLAMA_NORMS, attention, wide_norms
from moesurgeon.families.rules import RouterRule
from moesurgeon.families.stored import W1_W3_W2, both_layouts

_ROWS = {"{block}.gate.weight": 0, "{block}.e_score_correction_bias": 0}

MINIMAX_M2 = Family(
    name="minimax_m2",
    title="MiniMax-M2",
    model_types=("minimax_m2",),
    experts_keys=("num_local_experts", "num_experts"),
    expert_width_key="intermediate_size",
    mtp_key="num_mtp_modules",
    parts=(LLAMA_NORMS, *attention(), wide_norms()),
    router=RouterRule(scoring="sigmoid", renormalise=True, selection_bias=True),
    layouts=both_layouts(
        _ROWS,
        block="model.layers.{layer}.block_sparse_moe",
        projections=W1_W3_W2,
        running_block="model.layers.{layer}.mlp",
    ),
    bias_module="e_score_correction_bias",
)
