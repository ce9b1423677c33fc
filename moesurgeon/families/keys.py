"""Reading and editing config.json by key; a dot steps into a nested object (``ffn_config.moe_top_k``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesurgeon.errors import CheckpointError

# Layers and experts have at most six digits in the patterns of families; no model comes near, and a
# count from an untrusted config must not become a loop without end.
MAX_COUNT = 1_000_000

OTHER_EXPERT_COUNTS = (
    "n_experts", "n_expert", "num_expert", "expert_num", "expert_count", "num_moe_experts", "num_routed_experts",
    "num_total_experts", "n_local_experts", "moe_num_routed_experts", "num_experts_total",
)  # fmt: skip
"""Names of the number of experts that no family here has: of runtimes, converters and training frameworks."""
OTHER_TOP_KS = (
    "moe_router_topk", "router_topk", "router_top_k", "num_experts_per_token", "n_experts_per_tok", "n_expert_used",
    "expert_used_count", "num_selected_experts", "n_activated_experts", "num_activated_experts",
)  # fmt: skip
"""The same of the number of experts per token."""

REMOVED = object()
"""As a value: the key goes away."""


def value_at(config: Mapping[str, Any], key: str | None) -> Any:
    """Return what is under ``key``; None where it is absent."""
    found: Any = config
    for part in key.split(".") if key else ("",):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def is_present(config: Mapping[str, Any], key: str) -> bool:
    """Tell whether ``key`` is there, be it null."""
    outer, _, last = key.rpartition(".")
    holder = value_at(config, outer) if outer else config
    return isinstance(holder, Mapping) and last in holder


def with_value(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return ``config`` with another value under ``key``; the order and everything else stay."""
    first, _, rest = key.partition(".")
    edited = dict(config)
    if rest:
        inner = edited.get(first)
        edited[first] = with_value(inner if isinstance(inner, Mapping) else {}, rest, value)
    elif value is REMOVED:
        edited.pop(first, None)
    else:
        edited[first] = value
    return edited


def count_of(config: Mapping[str, Any], key: str | None, default: int) -> int:
    """Return the number under ``key``, or ``default`` where it is absent or null.

    Raises CheckpointError for anything that is no number from 0 to ``MAX_COUNT``.
    """
    value = value_at(config, key) if key else None
    if value is None:
        return default
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise CheckpointError(f"config.json gives {key} = {str(value)[:40]!r}, which is no usable number; restore it")
    return value
