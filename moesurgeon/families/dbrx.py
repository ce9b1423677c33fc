"""DBRX: config keys in nested objects, experts as consecutive rows of flat tensors."""

from moesurgeon.families.description import Family, Layout
from moesurgeon.families.parts import Parts
from moesurgeon.families.rules import RouterRule

_KEYS_VALUES = "2 * attn_config.kv_n_heads * (d_model // n_heads)"

DBRX = Family(
    name="dbrx",
    title="DBRX",
    model_types=("dbrx",),
    layers_key="n_layers",
    experts_keys=("ffn_config.moe_num_experts",),
    top_k_keys=("ffn_config.moe_top_k",),
    hidden_key="d_model",
    expert_width_key="ffn_config.ffn_hidden_size",
    layer="transformer.blocks.{layer}",
    attention=("transformer.blocks.{layer}.norm_attn_norm.",),
    embedding="transformer.wte.weight",
    final_norm="transformer.norm_f.weight",
    parts=(
        Parts(
            names={
                "norm_attn_norm.norm_1.weight": "d_model",
                "norm_attn_norm.norm_2.weight": "d_model",
                "norm_attn_norm.attn.Wqkv.weight": f"d_model + {_KEYS_VALUES}, d_model",
                "norm_attn_norm.attn.out_proj.weight": "d_model, d_model",
            }
        ),
    ),
    # By the p-norm of this key, 1.0 in all releases; null: raw.
    router=RouterRule(
        scoring="softmax", renormalise="ffn_config.moe_normalize_expert_weights", renormalise_default=True
    ),
    layouts=(
        Layout(
            name="flat",
            block="transformer.blocks.{layer}.ffn",
            per_expert_rows={"{block}.router.layer.weight": 0},
            fused="{block}.experts.mlp.",
            projections={"gate": "w1", "up": "v1", "down": "w2"},
        ),
    ),
    block_module="transformer.blocks.{layer}.ffn",
    router_module="router",
    not_run="its router returns logits only, so that what it chose cannot be observed yet",
)
