"""What each tensor of a checkpoint is for, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from moesurgeon.families import Family, Layout

Kind = Literal[
    "expert", "fused", "rows", "table", "companion", "beside", "unclear", "shared", "unknown-expert", "other"
]


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is for.

    ``kind``: one expert's tensor, a fused tensor of all experts, another tensor with one entry per
    expert (``axis`` counts them in all of these), a table whose values are experts, a shared expert's, something
    under an experts' prefix that the family does not describe, or anything else. What ``surgery.companions`` tells
    by shape: a companion has one entry per expert and is cut along, though the family does not have it; what is
    beside the experts holds for all of them; of what is unclear nobody knows. ``projection`` is the role name: gate,
    up, down...
    """

    kind: Kind
    layer: int | None = None
    expert: int | None = None
    projection: str | None = None
    suffix: str = ""
    axis: int = 0


# What no family leaves outside its block: experts of layers that are not described.
_OF_EXPERTS = re.compile(r"(.*\.)?experts\..+")


def layouts_in(family: Family, layout: Layout) -> tuple[Layout, ...]:
    """Return ``layout`` and, where layers for multi-token prediction have names of their own, the same for those."""
    return (layout, layout.under(family.layer, family.mtp_layer[0])) if family.mtp_layer else (layout,)


def roles_by_name(family: Family, layout: Layout, layers: int, names: Iterable[str]) -> dict[str, Role]:
    """Return the role of every tensor; layers for multi-token prediction are numbered from ``layers`` on."""
    mtp = layouts_in(family, layout)[1] if family.mtp_layer else None
    stray = family.stray_pattern(layout)

    def role_of(name: str) -> Role:
        if mtp and (match := family.mtp_pattern.fullmatch(name)):
            role = _role_in(mtp, name) or _other(name, int(match["layer"]))
            return replace(role, layer=layers + (role.layer or 0))
        if role_in_block := _role_in(layout, name):
            return role_in_block
        if match := family.layer_pattern.fullmatch(name):
            return _other(name, int(match["layer"]))
        return Role("unknown-expert") if stray.fullmatch(name) else _other(name, None)

    return {name: role_of(name) for name in names}


def _other(name: str, layer: int | None) -> Role:
    return Role("unknown-expert" if _OF_EXPERTS.fullmatch(name) else "other", layer)


def _role_in(layout: Layout, name: str) -> Role | None:
    """Return the role of a tensor that ``layout`` describes."""
    roles_by_name = {stored: role for role, stored in layout.projections.items()}
    if match := layout.expert_pattern.fullmatch(name):
        return Role(
            "expert",
            int(match["layer"]),
            int(match["expert"]),
            roles_by_name[match["projection"]],
            match["suffix"],
        )
    if match := layout.fused_pattern.fullmatch(name):
        return Role("fused", int(match["layer"]), None, roles_by_name[match["projection"]], match["suffix"] or "")
    for pattern, axis in layout.row_patterns:
        if match := pattern.fullmatch(name):
            return Role("rows", int(match["layer"]), axis=axis)
    if match := layout.table_pattern.fullmatch(name):
        return Role("table", int(match["layer"]))
    if match := layout.shared_pattern.fullmatch(name):
        return Role("shared", int(match["layer"]))
    if match := layout.anything_of_experts.fullmatch(name):
        return Role("unknown-expert", int(match["layer"]))
    return None
