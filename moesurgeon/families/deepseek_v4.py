"""DeepSeek-V4: the first layers choose by a table from token to experts, the others by score and bias.

Its tensors go by three sets of names: the hub's; those that transformers 5.23 saves, the hub's with most
of ``model.`` in front; and its own in memory, which it saves with ``save_original_format=False``.
"""

from collections.abc import Mapping

from moesurgeon.families.description import Family, Layout
from moesurgeon.families.rules import MoeLayers, RouterRule
from moesurgeon.families.stored import W1_W3_W2


def _family(*, outer: str, embedding: str, head: str, attention: tuple[str, ...], layout: Layout) -> Family:
    layer = f"{outer}layers.{{layer}}"
    return Family(
        name="deepseek_v4",
        title="DeepSeek-V4",
        model_types=("deepseek_v4",),
        experts_keys=("n_routed_experts", "num_local_experts", "num_experts"),
        shared_key="n_shared_experts",
        expert_width_key="moe_intermediate_size",
        moe_layers=MoeLayers(types_key="mlp_layer_types"),
        mtp_layer=("mtp.{layer}",),
        layer=layer,
        attention=tuple(f"{layer}.{part}" for part in attention),
        embedding=embedding,
        final_norm=f"{outer}norm.weight",
        head=head,
        router=RouterRule(
            scoring="sqrtsoftplus",
            renormalise=True,
            scale_key="routed_scaling_factor",
            scale_default=1.5,
            selection_bias=True,
        ),
        layouts=(layout,),
        not_run="its first layers choose experts by token, not by score",
    )


# The kinds of attention differ in what they compress by; hc: the residual streams of every layer.
_ATTENTION = ("attn.", "attn.compressor.", "attn.indexer.", "hc_")
_TABLE, _SHARED = "{block}.gate.tid2eid", "{block}.shared_experts."
_ROWS: Mapping[str, int] = {"{block}.gate.weight": 0, "{block}.gate.bias": 0}


def _one_by_one(outer: str) -> Layout:
    return Layout(
        name="per-expert",
        block=f"{outer}layers.{{layer}}.ffn",
        per_expert_rows=_ROWS,
        expert="{block}.experts.{expert}.",
        projections=W1_W3_W2,
        tables=(_TABLE,),
        shared=_SHARED,
    )


DEEPSEEK_V4 = _family(
    outer="", embedding="embed.weight", head="head.weight", attention=_ATTENTION, layout=_one_by_one("")
)

DEEPSEEK_V4_SAVED = _family(
    outer="model.",
    embedding="model.embed_tokens.weight",
    head="head.weight",
    attention=_ATTENTION,
    layout=_one_by_one("model."),
)

DEEPSEEK_V4_FUSED = _family(
    outer="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    attention=("self_attn.", "self_attn.compressor.", "self_attn.compressor.indexer.", "attn_hc.", "ffn_hc."),
    layout=Layout(
        name="fused",
        block="model.layers.{layer}.mlp",
        per_expert_rows={"{block}.gate.weight": 0, "{block}.gate.e_score_correction_bias": 0},
        projections={"gate_up": "gate_up_proj", "down": "down_proj"},
        tables=(_TABLE,),
        shared=_SHARED,
    ),
)
