"""Jamba: attention in some layers and Mamba in the others, experts in every other one, raw weights."""

from moesurgeon.families.description import Family
from moesurgeon.families.rules import MoeLayers, RouterRule
from moesurgeon.families.stored import both_layouts

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
    router=RouterRule(scoring="softmax", renormalise=False),
    layouts=both_layouts({"{block}.router.weight": 0}, block="model.layers.{layer}.feed_forward"),
    block_module="model.layers.{layer}.feed_forward",
    router_module="router",
    trained_since="5.23",
)
