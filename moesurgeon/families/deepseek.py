"""DeepSeek-MoE v1, V2 and V3: fine-grained experts, shared experts, dense first layers.

They share their tensor names and differ in the router. V1's gate takes its softmax in the model's
dtype; V1 and V2 use raw probabilities, V3 sigmoid scores with a selection bias and renormalisation.
"""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import DENSE_MLP, HEAD_DIM, LLAMA_NORMS, attention, latent_attention, mlp, mlp_biases
from moesurgeon.families.rules import Groups, MoeLayers, RouterRule
from moesurgeon.families.stored import both_layouts

_ROWS = {"{block}.gate.weight": 0, "{block}.gate.e_score_correction_bias": 0}

_SHARED_WIDTH = "n_shared_experts * moe_intermediate_size"
_SHARED = mlp("{block}.shared_experts", _SHARED_WIDTH, on="moe", when="n_shared_experts")
_BIASES = (
    mlp_biases("{block}", "intermediate_size", on="dense", when="mlp_bias"),
    mlp_biases("{block}.shared_experts", _SHARED_WIDTH, on="moe", when="n_shared_experts, mlp_bias"),
)
_LATENT = (LLAMA_NORMS, *latent_attention(), DENSE_MLP, _SHARED)

_LAYOUTS = both_layouts(_ROWS, shared="{block}.shared_experts.")

DEEPSEEK_V1 = Family(
    name="deepseek_v1",
    title="DeepSeek-MoE v1",
    model_types=("deepseek",),
    experts_keys=("n_routed_experts", "num_experts"),
    shared_key="n_shared_experts",
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(first_dense_key="first_k_dense_replace", frequency_key="moe_layer_freq"),
    parts=(LLAMA_NORMS, *attention(bias="attention_bias"), DENSE_MLP, _SHARED, _BIASES[0]),
    size_defaults=HEAD_DIM,
    router=RouterRule(scoring="softmax", renormalise="norm_topk_prob", single_is_raw=True),
    layouts=_LAYOUTS,
)

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    title="DeepSeek-V2",
    model_types=("deepseek_v2",),
    experts_keys=("n_routed_experts", "num_experts"),
    shared_key="n_shared_experts",
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(first_dense_key="first_k_dense_replace"),
    parts=(*_LATENT, *_BIASES),
    size_defaults={"q_lora_rank": 1536},
    # moe_layer_freq is in the hub's configs; native V2 does not read it (it is 1 in all of them).
    router=RouterRule(
        scoring="softmax",
        renormalise=False,  # norm_topk_prob is stored and ignored
        scale_key="routed_scaling_factor",
        groups=Groups(
            count_key="n_group",
            kept_key="topk_group",
            only_if=("topk_method", "group_limited_greedy"),
            score="max",
        ),
    ),
    layouts=_LAYOUTS,
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    title="DeepSeek-V3",
    model_types=("deepseek_v3",),
    experts_keys=("n_routed_experts", "num_local_experts", "num_experts"),
    shared_key="n_shared_experts",
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(first_dense_key="first_k_dense_replace"),
    mtp_key="num_nextn_predict_layers",
    parts=_LATENT,
    size_defaults={"q_lora_rank": 1536},
    router=RouterRule(
        scoring="sigmoid",
        renormalise="norm_topk_prob",
        renormalise_default=True,
        scale_key="routed_scaling_factor",
        scale_default=2.5,
        groups=Groups(
            count_key="n_group",
            kept_key="topk_group",
            count_default=8,
            kept_default=4,
            score="top2-sum",
        ),
        selection_bias=True,
    ),
    layouts=_LAYOUTS,
)
