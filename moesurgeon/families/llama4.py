"""Llama 4, on its own and inside the multimodal model, whose config and names are one level deeper."""

from moesurgeon.families.description import Family, Layout
from moesurgeon.families.parts import LLAMA_NORMS, attention, mlp
from moesurgeon.families.rules import MoeLayers, RouterRule


def _family(name: str, title: str, *, config: str, tensors: str) -> Family:
    return Family(
        name=name,
        title=title,
        model_types=(name,),
        layers_key=f"{config}num_hidden_layers",
        experts_keys=(f"{config}num_local_experts", f"{config}num_experts"),
        top_k_keys=(f"{config}num_experts_per_tok",),
        hidden_key=f"{config}hidden_size",
        expert_width_key=f"{config}intermediate_size",
        moe_layers=MoeLayers(layers_key=f"{config}moe_layers", step_key=f"{config}interleave_moe_layer_step"),
        layer=f"{tensors}model.layers.{{layer}}",
        attention=(f"{tensors}model.layers.{{layer}}.self_attn.",),
        embedding=f"{tensors}model.embed_tokens.weight",
        final_norm=f"{tensors}model.norm.weight",
        head=f"{tensors}lm_head.weight",
        parts=(
            LLAMA_NORMS,
            *attention(bias="attention_bias"),
            mlp("{block}", "intermediate_size_mlp", on="dense"),
            mlp("{block}.shared_expert", "intermediate_size", on="moe"),
        ),
        router=RouterRule(scoring="sigmoid", renormalise=False),
        layouts=(
            Layout(
                name="fused",
                block=f"{tensors}model.layers.{{layer}}.feed_forward",
                per_expert_rows={"{block}.router.weight": 0},
                projections={"gate_up": "gate_up_proj", "down": "down_proj"},
                transposed=True,
                shared="{block}.shared_expert.",
            ),
        ),
        block_module=f"{tensors}model.layers.{{layer}}.feed_forward",
        router_module="router",
        not_run="its router scales what goes into the experts, not what comes out of them",
    )


LLAMA4_TEXT = _family("llama4_text", "Llama 4 (text)", config="", tensors="")
LLAMA4 = _family("llama4", "Llama 4", config="text_config.", tensors="language_model.")
