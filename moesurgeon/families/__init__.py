"""The model families that moesurgeon knows: names, config keys and router rules, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesurgeon.errors import UnknownFamily
from moesurgeon.families.deepseek import DEEPSEEK_V1, DEEPSEEK_V2, DEEPSEEK_V3
from moesurgeon.families.description import Family, Layout, RouterRule
from moesurgeon.families.mixtral import MIXTRAL
from moesurgeon.families.qwen2_moe import QWEN2_MOE

__all__ = ["FAMILIES", "Family", "Layout", "RouterRule", "family_of"]

FAMILIES: tuple[Family, ...] = (MIXTRAL, DEEPSEEK_V1, DEEPSEEK_V2, DEEPSEEK_V3, QWEN2_MOE)


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family whose ``model_type`` the config names.

    Raises UnknownFamily, with the list of what is known, for anything else.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    if model_type is None:
        raise UnknownFamily(f"config.json has no model_type; moesurgeon knows {known}")
    raise UnknownFamily(f"model_type {str(model_type)[:60]!r} is not known; moesurgeon knows {known}")
