"""GLM-4-MoE, GLM-4-MoE-Lite and dots.llm1: the router of DeepSeek-V3, other attention and other defaults."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import (
    DENSE_MLP,
    HEAD_DIM,
    LLAMA_NORMS,
    Parts,
    SizeDefaults,
    attention,
    head_norms,
    latent_attention,
    mlp,
)
from moesurgeon.families.rules import Groups, MoeLayers, RouterRule
from moesurgeon.families.stored import both_layouts

_SHARED = mlp("{block}.shared_experts", "n_shared_experts * moe_intermediate_size", on="moe", when="n_shared_experts")


def _family(
    name: str,
    title: str,
    *,
    parts: tuple[Parts, ...],
    size_defaults: SizeDefaults = HEAD_DIM,
    types_key: str | None = None,
    dense_by_default: int = 1,
    renormalises_by_default: bool = True,
    scale_by_default: float = 1.0,
    mtp_key: str | None = "num_nextn_predict_layers",
) -> Family:
    return Family(
        name=name,
        title=title,
        model_types=(name,),
        experts_keys=("n_routed_experts", "num_local_experts", "num_experts"),
        shared_key="n_shared_experts",
        expert_width_key="moe_intermediate_size",
        moe_layers=MoeLayers(
            first_dense_key="first_k_dense_replace",
            types_key=types_key,
            defaults={"first_k_dense_replace": dense_by_default},
        ),
        mtp_key=mtp_key,
        parts=(LLAMA_NORMS, *parts, DENSE_MLP, _SHARED),
        size_defaults=size_defaults,
        router=RouterRule(
            scoring="sigmoid",
            renormalise="norm_topk_prob",
            renormalise_default=renormalises_by_default,
            scale_key="routed_scaling_factor",
            scale_default=scale_by_default,
            groups=Groups(count_key="n_group", kept_key="topk_group", score="top2-sum"),
            selection_bias=True,
        ),
        layouts=both_layouts(
            {"{block}.gate.weight": 0, "{block}.gate.e_score_correction_bias": 0}, shared="{block}.shared_experts."
        ),
    )


GLM4_MOE = _family(
    "glm4_moe",
    "GLM-4-MoE",
    parts=(*attention(bias="attention_bias", out_bias=False), head_norms(when="use_qk_norm")),
)
GLM4_MOE_LITE = _family(
    "glm4_moe_lite",
    "GLM-4-MoE-Lite",
    parts=latent_attention(),
    size_defaults={"q_lora_rank": 768},
    types_key="mlp_layer_types",
    scale_by_default=1.8,
)
DOTS1 = _family(
    "dots1",
    "dots.llm1",
    parts=(*attention(bias="attention_bias"), head_norms()),
    dense_by_default=0,
    renormalises_by_default=False,
    mtp_key=None,
)
