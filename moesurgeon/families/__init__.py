"""The model families that moesurgeon knows: names, config keys and router rules, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesurgeon.errors import UnknownFamily
from moesurgeon.families.dbrx import DBRX
from moesurgeon.families.deepseek import DEEPSEEK_V1, DEEPSEEK_V2, DEEPSEEK_V3
from moesurgeon.families.deepseek_v4 import DEEPSEEK_V4, DEEPSEEK_V4_FUSED, DEEPSEEK_V4_SAVED
from moesurgeon.families.description import Family, Layout
from moesurgeon.families.ernie4_5_moe import ERNIE4_5_MOE
from moesurgeon.families.glm4_moe import DOTS1, GLM4_MOE, GLM4_MOE_LITE
from moesurgeon.families.gpt_oss import GPT_OSS
from moesurgeon.families.granitemoe import GRANITEMOE
from moesurgeon.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from moesurgeon.families.jamba import JAMBA
from moesurgeon.families.lfm2_moe import LFM2_MOE
from moesurgeon.families.llama4 import LLAMA4, LLAMA4_TEXT
from moesurgeon.families.minimax_m2 import MINIMAX_M2
from moesurgeon.families.mixtral import MIXTRAL
from moesurgeon.families.olmoe import OLMOE
from moesurgeon.families.phimoe import PHIMOE
from moesurgeon.families.qwen2_moe import QWEN2_MOE
from moesurgeon.families.qwen3_moe import QWEN3_MOE
from moesurgeon.families.rules import RouterRule

__all__ = ["FAMILIES", "Family", "Layout", "RouterRule", "families_of"]

FAMILIES: tuple[Family, ...] = (
    MIXTRAL,
    DEEPSEEK_V1,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    DEEPSEEK_V4_SAVED,
    DEEPSEEK_V4_FUSED,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GPT_OSS,
    GRANITEMOE,
    ERNIE4_5_MOE,
    GLM4_MOE,
    GLM4_MOE_LITE,
    DOTS1,
    MINIMAX_M2,
    JAMBA,
    HUNYUAN_V1_MOE,
    LFM2_MOE,
    DBRX,
    LLAMA4,
    LLAMA4_TEXT,
    PHIMOE,
)


def families_of(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """Return the families whose ``model_type`` the config names: one, or one for each way to name all its tensors.

    Raises UnknownFamily, with the list of what is known, for anything else.
    """
    model_type = config.get("model_type")
    if found := tuple(family for family in FAMILIES if model_type in family.model_types):
        return found
    known = ", ".join(dict.fromkeys(model_type for family in FAMILIES for model_type in family.model_types))
    if model_type is None:
        raise UnknownFamily(f"config.json has no model_type; moesurgeon knows {known}")
    raise UnknownFamily(f"model_type {str(model_type)[:60]!r} is not known; moesurgeon knows {known}")
