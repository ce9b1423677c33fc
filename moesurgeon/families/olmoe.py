"""OLMoE and FlexOlmo, which differ in their norms: every layer a mixture, raw weights unless the config says else."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import HEAD_DIM, Parts, attention, norms, wide_norms
from moesurgeon.families.rules import RouterRule
from moesurgeon.families.stored import both_layouts

OLMOE = Family(
    name="olmoe",
    title="OLMoE",
    model_types=("olmoe", "flex_olmo"),
    experts_keys=("num_experts", "num_local_experts"),
    expert_width_key="intermediate_size",
    parts=(
        Parts(names=norms("post_attention_layernorm")),
        Parts(names=norms("input_layernorm"), when="model_type=olmoe"),
        Parts(names=norms("post_feedforward_layernorm"), when="model_type=flex_olmo"),
        *attention(bias="attention_bias"),
        wide_norms(),
    ),
    size_defaults=HEAD_DIM,
    router=RouterRule(scoring="softmax", renormalise="norm_topk_prob"),
    layouts=both_layouts({"{block}.gate.weight": 0}),
)
