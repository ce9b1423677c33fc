"""Parameters and matrix-multiplication FLOPs of a checkpoint, from its headers.

FLOPs count two per weight and token (a multiplication and an addition) for every matrix that a token
passes through in a forward pass. Attention scores, which grow with the context, norms, activations and
the rotary embedding are not counted; nor are layers for multi-token prediction, which plain decoding
does not run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moesurgeon.surgery.anatomy import Anatomy

# The spellings of quantisation scales; other tensors may be called scale and be weights.
_SCALES = re.compile(r"(weight_scale(_inv)?|_proj_scale(_inv)?|_scales|\.scale|\.qscale_\w+|(input|activation)_scale)$")
# What quantisers store beside packed weights: zero points, group numbers, shapes, tables.
_BESIDE = re.compile(
    r"\.(qzeros|scales|g_idx|weight_(shape|zero_point|g_idx|global_scale|scale_2)|input_global_scale|SCB|weight_format|"
    r"(weight\.)?(nested_)?(absmax|quant_map)|weight\.quant_state\..+)$"
)
# Names of integers that hold several weights each.
_WORDS = (".qweight", ".weight_packed")
_WORD_BITS = {"I32": 32, "I16": 16, "U8": 8, "I8": 8, "I64": 64}
# What two weights of four bits are stored as.
_BYTES = ("I8", "U8")


@dataclass(frozen=True, slots=True)
class Parameters:
    """``total``, those ``active`` for one token, and those of the routed ``experts``."""

    total: int
    active: int
    experts: int


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs per token by part of the model."""

    attention: int
    router: int
    routed_experts: int
    shared_experts: int
    dense_mlp: int
    head: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        return {"total": self.total, **asdict(self)}


def count_parameters(anatomy: Anatomy) -> Parameters:
    """Count weights (not the scales of quantised ones)."""
    total = sum(_weights(anatomy, name) for name, role in anatomy.roles.items() if role.kind != "table")
    # Layers for multi-token prediction are part of the file, not of what a token runs through.
    mtp = sum(_weights(anatomy, name) for name, role in anatomy.roles.items() if (role.layer or 0) >= anatomy.layers)
    experts = _routed(anatomy, anatomy.routed_layers)
    idle = sum(
        _routed(anatomy, (layer,)) * (anatomy.experts - anatomy.top_ks[layer]) // anatomy.experts
        for layer in anatomy.moe_layers
    )
    active = total - mtp - idle
    return Parameters(total, active, experts)


def count_flops(anatomy: Anatomy) -> Flops:
    """Count FLOPs per token by part."""
    parts = dict.fromkeys(("attention", "router", "routed_experts", "shared_experts", "dense_mlp", "head"), 0)
    for name, spec in anatomy.tensors.items():
        role = anatomy.roles[name]
        if role.kind in ("expert", "fused", "table") or (role.layer or 0) >= anatomy.layers or len(spec.shape) < 2:
            continue
        if role.kind == "rows":
            parts["router"] += 2 * _weights(anatomy, name) if name.endswith(".weight") else 0  # biases are only added
        elif role.kind == "shared":
            parts["shared_experts"] += 2 * _weights(anatomy, name)
        elif role.layer is None:
            # A tied head multiplies by the embedding.
            is_head = name == anatomy.family.head
            tied = name == anatomy.family.embedding and anatomy.family.head not in anatomy.tensors
            parts["head"] += 2 * _weights(anatomy, name) if is_head or tied else 0
        elif name.startswith(tuple(prefix.replace("{layer}", str(role.layer)) for prefix in anatomy.family.attention)):
            parts["attention"] += 2 * _weights(anatomy, name)
        else:
            parts["shared_experts" if role.layer in anatomy.moe_layers else "dense_mlp"] += 2 * _weights(anatomy, name)
    parts["routed_experts"] = sum(
        2 * _routed(anatomy, (layer,), biases=False) * anatomy.top_ks[layer] // anatomy.experts
        for layer in anatomy.moe_layers
    )
    return Flops(**parts)


def _routed(anatomy: Anatomy, layers: tuple[int, ...], *, biases: bool = True) -> int:
    return sum(
        _weights(anatomy, name)
        for layer in layers
        for name, role in anatomy.of_kind("expert", "fused", layer=layer)
        if biases or not role.suffix.endswith("bias")
    )


def _weights(anatomy: Anatomy, name: str) -> int:
    """Number of weights in a tensor; 0 for what quantisers store beside them, several for each element of packed ones.

    Packed are two in a byte in FP4 (MXFP4 blocks, DeepSeek-V4's experts, NVFP4, NF4), and as many in an integer as the
    quantiser's bits allow in GPTQ, AWQ and compressed-tensors.
    """
    spec, role = anatomy.tensors[name], anatomy.roles[name]
    count = math.prod(spec.shape)
    if _BESIDE.search(name):
        return 0
    if not name.endswith(".weight") and _SCALES.search(name):
        # What is only called scale, and belongs to no quantised weight, is a weight itself.
        belongs = not name.endswith(".scale") or f"{name.removesuffix('scale')}weight" in anatomy.tensors
        if belongs:
            return 0
    if name.endswith(_WORDS) and spec.dtype in _WORD_BITS:
        bits = quantised_bits(anatomy.config)
        return count * _WORD_BITS[spec.dtype] // bits if bits else count
    halved = role.kind == "expert" and spec.dtype in _BYTES and 2 * count == anatomy.hidden * anatomy.expert_width
    nibbles = spec.dtype == "U8" and name.endswith(".weight") and quantised_bits(anatomy.config) == 4
    return count * (2 if halved or nibbles or name.endswith("_blocks") else 1)


def quantised_bits(config: Mapping[str, Any]) -> int | None:
    """Return how many bits config.json says that a quantised weight has; None where it does not say.

    >>> quantised_bits({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    4
    """
    said = config.get("quantization_config")
    if not isinstance(said, Mapping):
        return None
    groups = said.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    named = [
        said.get("bits"),
        said.get("w_bit"),
        *(each.get("num_bits") for each in weights if isinstance(each, Mapping)),
    ]
    bits = [each for each in named if type(each) is int and 0 < each <= 32]
    if bits:
        return bits[0]
    four = (
        said.get("load_in_4bit")
        or said.get("_load_in_4bit")
        or "fp4" in str([said.get("quant_method"), said.get("quant_algo")]).lower()
    )
    return 4 if four else None
