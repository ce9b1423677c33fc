"""DeepSeek-V4: the first layers choose by a table from token to experts, the others by score and bias.

The names are the hub's; transformers 5.23 itself writes them with ``model.`` in front.
"""

from moesurgeon.families.description import Family, Layout
from moesurgeon.families.rules import MoeLayers, RouterRule
from moesurgeon.families.stored import W1_W3_W2

DEEPSEEK_V4 = Family(
    name="deepseek_v4",
    title="DeepSeek-V4",
    model_types=("deepseek_v4",),
    experts_keys=("n_routed_experts", "num_local_experts", "num_experts"),
    shared_key="n_shared_experts",
    expert_width_key="moe_intermediate_size",
    moe_layers=MoeLayers(types_key="mlp_layer_types"),
    layer="layers.{layer}",
    # The kinds of attention differ in what they compress by; hc_: the residual streams of every layer.
    attention=(
        "layers.{layer}.attn.",
        "layers.{layer}.attn.compressor.",
        "layers.{layer}.attn.indexer.",
        "layers.{layer}.hc_",
    ),
    embedding="embed.weight",
    final_norm="norm.weight",
    head="head.weight",
    router=RouterRule(
        scoring="sqrtsoftplus",
        renormalise=True,
        scale_key="routed_scaling_factor",
        scale_default=1.5,
        selection_bias=True,
    ),
    layouts=(
        Layout(
            name="per-expert",
            block="layers.{layer}.ffn",
            per_expert_rows={"{block}.gate.weight": 0, "{block}.gate.bias": 0},
            expert="{block}.experts.{expert}.",
            projections=W1_W3_W2,
            tables=("{block}.gate.tid2eid",),
            shared="{block}.shared_experts.",
        ),
    ),
    not_run="its first layers choose experts by token, not by score",
)
