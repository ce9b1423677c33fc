"""OLMoE and FlexOlmo, which differ in their norms: every layer a mixture, raw weights unless the config says else."""

from moesurgeon.families.description import Family
from moesurgeon.families.rules import RouterRule
from moesurgeon.families.stored import both_layouts

OLMOE = Family(
    name="olmoe",
    title="OLMoE",
    model_types=("olmoe", "flex_olmo"),
    experts_keys=("num_experts", "num_local_experts"),
    expert_width_key="intermediate_size",
    router=RouterRule(scoring="softmax", renormalise="norm_topk_prob"),
    layouts=both_layouts({"{block}.gate.weight": 0}),
)
