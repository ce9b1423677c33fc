"""What a layer holds besides its routed experts and their router, with shapes: what stock transformers asks for.

Names are below the layer; ``{block}`` is the MoE block's name there. Sizes are sums and products of config keys and
numbers, one for each dimension: ``"num_attention_heads * head_dim, hidden_size"``. A size whose key the config lacks
is unknown, unless ``SizeDefaults`` say what transformers takes then.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moesurgeon.families.keys import MAX_COUNT, is_present, value_at

SizeDefaults = Mapping[str, str | bool | int]
HEAD_DIM: SizeDefaults = {"head_dim": "hidden_size // num_attention_heads"}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """``names`` -> shapes of tensors that every layer of a kind has.

    ``on``: all layers, the mixtures ("moe"), the dense ones, those that hold a tensor with the prefix after ``has:``,
    or before and after all layers ("ends", with full names).
    ``when``: a config key that must be true, or with ``=`` have that value; with ``!`` in front, not so;
    several, after commas, must all hold.
    """

    names: Mapping[str, str]
    on: str = "all"
    when: str | None = None

    def apply(self, config: Mapping[str, Any], defaults: SizeDefaults) -> bool:
        """Tell whether ``config`` asks for these tensors."""
        return all(_is_so(each.strip(), config, defaults) for each in (self.when or "").split(",") if each)


def _is_so(condition: str, config: Mapping[str, Any], defaults: SizeDefaults) -> bool:
    key, _, wanted = condition.removeprefix("!").partition("=")
    value = value_at(config, key) if is_present(config, key) else defaults.get(key)
    return (str(value) == wanted if wanted else bool(value)) is not condition.startswith("!")


def shape_of(sizes: str, config: Mapping[str, Any], defaults: SizeDefaults) -> tuple[int | None, ...]:
    """Return a shape; None for a size that ``config`` does not tell.

    >>> shape_of("heads * 2 + 1, wide", {"heads": 4}, {})
    (9, None)
    """
    return tuple(_value(_parsed(size.strip()), config, defaults) for size in sizes.split(","))


@lru_cache(maxsize=256)
def _parsed(size: str) -> ast.expr:
    return ast.parse(size, mode="eval").body


def _value(node: ast.expr, config: Mapping[str, Any], defaults: SizeDefaults) -> int | None:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=operator, right=right):
            one, other = _value(left, config, defaults), _value(right, config, defaults)
            if one is None or other is None:
                return None
            match operator:
                case ast.Add():
                    return one + other
                case ast.Mult():
                    return one * other
                case ast.FloorDiv():
                    return one // other if other else None
    if isinstance(node, ast.Name | ast.Attribute):
        key = ast.unparse(node)
        value = value_at(config, key)
        if value is None and key in defaults:
            default = defaults[key]
            return _value(_parsed(default), config, defaults) if isinstance(default, str) else int(default)
        return value if type(value) is int and 0 <= value <= MAX_COUNT else None
    raise AssertionError(f"no size: {ast.dump(node)}")


def norms(*names: str) -> dict[str, str]:
    """Return norms as wide as the model."""
    return {f"{name}.weight": "hidden_size" for name in names}


def attention(
    out: str = "o_proj", *, bias: str | None = None, on: str = "all", out_bias: bool = True
) -> tuple[Parts, ...]:
    """Return plain attention with grouped keys; ``bias``: the key that gives its projections biases."""
    queries, keys = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
    wide = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    weights = {f"self_attn.{name}.weight": f"{size}, hidden_size" for name, size in wide.items()}
    weights[f"self_attn.{out}.weight"] = f"hidden_size, {queries}"
    found = [Parts(names=weights, on=on)]
    if bias is not None:
        biases = {f"self_attn.{name}.bias": size for name, size in wide.items()}
        if out_bias:
            biases[f"self_attn.{out}.bias"] = "hidden_size"
        found.append(Parts(names=biases, on=on, when=bias))
    return tuple(found)


def latent_attention(*, bias: str = "attention_bias") -> tuple[Parts, ...]:
    """Return DeepSeek's multi-head latent attention, with queries of full rank or of a low one."""
    per_head = "qk_nope_head_dim + qk_rope_head_dim"
    both = f"num_attention_heads * ({per_head})"
    shared = {
        "self_attn.kv_a_proj_with_mqa.weight": "kv_lora_rank + qk_rope_head_dim, hidden_size",
        "self_attn.kv_a_layernorm.weight": "kv_lora_rank",
        "self_attn.kv_b_proj.weight": "num_attention_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank",
        "self_attn.o_proj.weight": "hidden_size, num_attention_heads * v_head_dim",
    }
    low = {
        "self_attn.q_a_proj.weight": "q_lora_rank, hidden_size",
        "self_attn.q_a_layernorm.weight": "q_lora_rank",
        "self_attn.q_b_proj.weight": f"{both}, q_lora_rank",
    }
    biases = {
        "self_attn.kv_a_proj_with_mqa.bias": "kv_lora_rank + qk_rope_head_dim",
        "self_attn.o_proj.bias": "hidden_size",
    }
    return (
        Parts(names=shared),
        Parts(names=low, when="q_lora_rank"),
        Parts(names={"self_attn.q_proj.weight": f"{both}, hidden_size"}, when="!q_lora_rank"),
        Parts(names=biases, when=bias),
        Parts(names={"self_attn.q_a_proj.bias": "q_lora_rank"}, when=f"q_lora_rank, {bias}"),
    )


def mlp(
    prefix: str,
    wide: str,
    *,
    on: str,
    when: str | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Parts:
    """Return a gated MLP of the width ``wide`` under ``prefix``: gate, up, down."""
    gate, up, down = names
    into, out = f"{wide}, hidden_size", f"hidden_size, {wide}"
    return Parts(
        names={f"{prefix}.{gate}.weight": into, f"{prefix}.{up}.weight": into, f"{prefix}.{down}.weight": out},
        on=on,
        when=when,
    )


def mlp_biases(prefix: str, wide: str, *, on: str, when: str) -> Parts:
    """Return the biases of such an MLP."""
    sizes = {"gate_proj": wide, "up_proj": wide, "down_proj": "hidden_size"}
    return Parts(names={f"{prefix}.{name}.bias": size for name, size in sizes.items()}, on=on, when=when)


def head_norms(queries: str = "q_norm", keys: str = "k_norm", *, on: str = "all", when: str | None = None) -> Parts:
    """Return norms of queries and keys that all heads share."""
    return Parts(
        names={f"self_attn.{queries}.weight": "head_dim", f"self_attn.{keys}.weight": "head_dim"}, on=on, when=when
    )


def wide_norms() -> Parts:
    """Return norms over the queries, and the keys, of all heads together."""
    return Parts(
        names={
            "self_attn.q_norm.weight": "num_attention_heads * head_dim",
            "self_attn.k_norm.weight": "num_key_value_heads * head_dim",
        }
    )


LLAMA_NORMS = Parts(names=norms("input_layernorm", "post_attention_layernorm"))
DENSE_MLP = mlp("{block}", "intermediate_size", on="dense")
