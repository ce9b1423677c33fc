"""GPT-OSS: fused experts with biases, gate and up interleaved, [E, in, out]; MXFP4 as it is published."""

from moesurgeon.families.description import Family, Layout
from moesurgeon.families.parts import LLAMA_NORMS, Parts, attention
from moesurgeon.families.rules import RouterRule

GPT_OSS = Family(
    name="gpt_oss",
    title="GPT-OSS",
    model_types=("gpt_oss",),
    experts_keys=("num_local_experts", "num_experts"),
    top_k_keys=("num_experts_per_tok", "experts_per_token"),
    expert_width_key="intermediate_size",
    parts=(
        LLAMA_NORMS,
        *attention(bias="attention_bias"),
        Parts(names={"self_attn.sinks": "num_attention_heads"}),
    ),
    size_defaults={"attention_bias": True},
    # The softmax of the chosen logits is the softmax of all, renormalised.
    router=RouterRule(scoring="softmax", renormalise=True),
    layouts=(
        Layout(
            name="fused",
            block="model.layers.{layer}.mlp",
            per_expert_rows={"{block}.router.weight": 0, "{block}.router.bias": 0},
            projections={"gate_up": "gate_up_proj", "down": "down_proj"},
            transposed=True,
        ),
    ),
    router_module="router",
    not_run="its experts have biases and a gate of their own, which moesurgeon does not compute yet",
)
