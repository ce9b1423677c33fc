"""What config.json says of the tensors and they do not keep, where every edit copies the contradiction as it is.

None of it stops an edit: the copy is as right or wrong as its source. Loaders differ in what they make of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moesurgeon.errors import and_more
from moesurgeon.families.keys import value_at
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.expected import PACKED, unexpected_tensors

# How configs on the hub count layers for multi-token prediction, with and without a family that says so.
_MTP_KEYS = (
    "num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers", "mtp_num_layers",
    "num_mtp_predict_layers", "n_mtp_layers",
)  # fmt: skip
_MTP_NAMES = ("mtp", "nextn")
# Where configs of several models in one keep the one that reads text.
_INNER = ("text_config", "llm_config", "language_config")
# What is a size of the model, whichever family: said twice it has to be said alike.
_SIZES = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "moe_intermediate_size", "tie_word_embeddings",
)  # fmt: skip
_QUANTISED = ("qweight", "weight_packed", "_blocks", ".SCB", ".absmax", "weight_scale", "weight_scale_inv")


def broken_claims(anatomy: Anatomy, *, quantised_elsewhere: bool = False) -> Iterator[str]:
    """Yield what ``anatomy``'s config claims in vain, a line each.

    ``quantised_elsewhere``: another file than config.json says how the weights are quantised.
    """
    yield from promised_mtp(anatomy)
    yield from _quantisation(anatomy, elsewhere=quantised_elsewhere)
    yield from _two_levels(anatomy)
    if unexpected := unexpected_tensors(anatomy):
        more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
        are = "is a tensor" if len(unexpected) == 1 else "are tensors"
        yield (
            f"{', '.join(unexpected[:3])}{more} {are} that config.json gives no place: transformers ignores them, vLLM "
            "refuses them"
        )


def promised_mtp(anatomy: Anatomy) -> Iterator[str]:
    """Yield the layers for multi-token prediction that the config counts and no shard holds."""
    for place, config in _levels(anatomy.config):
        for key in dict.fromkeys((anatomy.family.mtp_key or _MTP_KEYS[0], *_MTP_KEYS)):
            count = value_at(config, key)
            if type(count) is not int or count <= 0 or config.get("use_mtp") is False:
                continue
            beyond = {layer for layer in anatomy.by_layer if layer >= anatomy.layers}
            if not beyond and not any(name in tensor for tensor in anatomy.tensors for name in _MTP_NAMES):
                yield (
                    f"config.json promises {count} MTP layers ({place}{key}), but no tensor of them is stored: "
                    "llama.cpp's converter trusts the number and then misses the block; set it to 0"
                )


def _quantisation(anatomy: Anatomy, *, elsewhere: bool) -> Iterator[str]:
    said = anatomy.config.get("quantization_config") or anatomy.config.get("compression_config")
    packed = [
        name
        for name, spec in anatomy.tensors.items()
        if anatomy.roles[name].kind != "table"
        and (spec.dtype in PACKED or spec.dtype.startswith("F8") or name.endswith(_QUANTISED))
    ]
    if said and not packed:
        method = said.get("quant_method") if isinstance(said, Mapping) else said
        yield (
            f"config.json says that the weights are quantised ({str(method)[:40]}), but none is: some loaders fail "
            "or ask for the quantiser; remove quantization_config"
        )
    if packed and not said and not elsewhere:
        yield (
            f"{and_more(packed)} {'is' if len(packed) == 1 else 'are'} quantised, but config.json has no "
            "quantization_config: loaders take them as they are, without their scales"
        )


def _two_levels(anatomy: Anatomy) -> Iterator[str]:
    family = anatomy.family
    keys = {*family.experts_keys, *family.top_k_keys, family.layers_key, family.hidden_key, family.expert_width_key}
    names = sorted({*(key.rpartition(".")[2] for key in keys), *_SIZES})
    for place, inner in _levels(anatomy.config)[1:]:
        for name in names:
            one, other = anatomy.config.get(name), inner.get(name)
            if one is not None and other is not None and one != other:
                yield (
                    f"config.json contradicts itself: {name} = {str(one)[:40]} and {place}{name} = {str(other)[:40]}; "
                    "loaders differ in which they read"
                )


def _levels(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the config and those nested in it that are of the text model, with the prefix of their keys."""
    inner = [(f"{name}.", config[name]) for name in _INNER if isinstance(config.get(name), Mapping)]
    return [("", config), *inner]
