"""GLM-4-MoE, GLM-4-MoE-Lite and dots.llm1: the router of DeepSeek-V3, other attention and other defaults."""

from moesurgeon.families.description import Family
from moesurgeon.families.rules import Groups, MoeLayers, RouterRule
from moesurgeon.families.stored import both_layouts

_LAYOUTS = both_layouts(
    {"{block}.gate.weight": 0, "{block}.gate.e_score_correction_bias": 0}, shared="{block}.shared_experts."
)
_GROUPS = Groups(count_key="n_group", kept_key="topk_group", score="top2-sum")
_EXPERTS_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")

GLM4_MOE = Family(
    name="glm4_moe",
    title="GLM-4-MoE",
    model_types=("glm4_moe",),
    experts_keys=_EXPERTS_KEYS,
    shared_key="n_shared_experts",
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(first_dense_key="first_k_dense_replace", defaults={"first_k_dense_replace": 1}),
    mtp_key="num_nextn_predict_layers",
    router=RouterRule(
        scoring="sigmoid",
        renormalise="norm_topk_prob",
        renormalise_default=True,
        scale_key="routed_scaling_factor",
        groups=_GROUPS,
        selection_bias=True,
    ),
    layouts=_LAYOUTS,
)

GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    title="GLM-4-MoE-Lite",
    model_types=("glm4_moe_lite",),
    experts_keys=_EXPERTS_KEYS,
    shared_key="n_shared_experts",
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(
        first_dense_key="first_k_dense_replace",
        types_key="mlp_layer_types",
        defaults={"first_k_dense_replace": 1},
    ),
    mtp_key="num_nextn_predict_layers",
    router=RouterRule(
        scoring="sigmoid",
        renormalise="norm_topk_prob",
        renormalise_default=True,
        scale_key="routed_scaling_factor",
        scale_default=1.8,
        groups=_GROUPS,
        selection_bias=True,
    ),
    layouts=_LAYOUTS,
)

DOTS1 = Family(
    name="dots1",
    title="dots.llm1",
    model_types=("dots1",),
    experts_keys=_EXPERTS_KEYS,
    shared_key="n_shared_experts",
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(first_dense_key="first_k_dense_replace"),
    router=RouterRule(
        scoring="sigmoid",
        renormalise="norm_topk_prob",
        scale_key="routed_scaling_factor",
        groups=_GROUPS,
        selection_bias=True,
    ),
    layouts=_LAYOUTS,
)
