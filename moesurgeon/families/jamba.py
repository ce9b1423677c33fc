"""Jamba: attention in some layers and Mamba in the others, experts in every other one, raw weights."""

from moesurgeon.families.description import Family
from moesurgeon.families.parts import HEAD_DIM, Parts, attention, mlp, norms
from moesurgeon.families.rules import MoeLayers, RouterRule
from moesurgeon.families.stored import both_layouts

_INNER = "mamba_expand * hidden_size"
_MAMBA = {
    "mamba.in_proj.weight": f"2 * {_INNER}, hidden_size",
    "mamba.conv1d.weight": f"{_INNER}, 1, mamba_d_conv",
    "mamba.x_proj.weight": f"mamba_dt_rank + 2 * mamba_d_state, {_INNER}",
    "mamba.dt_proj.weight": f"{_INNER}, mamba_dt_rank",
    "mamba.dt_proj.bias": _INNER,
    "mamba.A_log": f"{_INNER}, mamba_d_state",
    "mamba.D": _INNER,
    "mamba.out_proj.weight": f"hidden_size, {_INNER}",
    "mamba.dt_layernorm.weight": "mamba_dt_rank",
    "mamba.b_layernorm.weight": "mamba_d_state",
    "mamba.c_layernorm.weight": "mamba_d_state",
}

JAMBA = Family(
    name="jamba",
    title="Jamba",
    model_types=("jamba",),
    experts_keys=("num_experts", "num_local_experts"),
    expert_width_key="intermediate_size",
    moe_layers=MoeLayers(
        frequency_key="expert_layer_period",
        offset_key="expert_layer_offset",
        defaults={"expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    attention=("model.layers.{layer}.self_attn.", "model.layers.{layer}.mamba."),
    final_norm="model.final_layernorm.weight",
    parts=(
        Parts(names=norms("input_layernorm", "pre_ff_layernorm")),
        *attention(on="has:self_attn."),
        Parts(names=_MAMBA, on="has:mamba."),
        Parts(names={"mamba.conv1d.bias": _INNER}, on="has:mamba.", when="mamba_conv_bias"),
        Parts(
            names={"mamba.in_proj.bias": f"2 * {_INNER}", "mamba.out_proj.bias": "hidden_size"},
            on="has:mamba.",
            when="mamba_proj_bias",
        ),
        mlp("{block}", "intermediate_size", on="dense"),
    ),
    size_defaults={**HEAD_DIM, "mamba_expand": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_conv_bias": True},
    router=RouterRule(scoring="softmax", renormalise=False),
    layouts=both_layouts({"{block}.router.weight": 0}, block="model.layers.{layer}.feed_forward"),
    block_module="model.layers.{layer}.feed_forward",
    router_module="router",
    trained_since="5.23",
)
