"""Tensors beside the experts that no family describes: cut along, or named where nobody knows what they count.

A scale of a quantised router, a selection bias in a family without one, a running count of tokens: left as they are
when experts go, such tensors belong to other experts than before, and loaders do not see it. What has an entry per
expert by its name is a companion. Anything else of a mixture with as many entries as there are experts is unclear.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.families import Family, Layout
from moesurgeon.families.companions import BLOCK_SCALES, ROUTER_SCALES
from moesurgeon.surgery.roles import Role, layouts_in

# What a tensor outside the described blocks is called that may count experts.
_SPEAKS_OF_EXPERTS = re.compile(r"(?<!shared)(?:^|[._])(?:experts?|router|moe|gating)(?:[._]|$)")
# Holds the shape of another tensor, not an entry per anything.
_A_SHAPE = re.compile(r".*[._]shape")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The numbers that a shape is read by."""

    experts: int
    top_k: int
    hidden: int
    expert_width: int


def with_companions(
    family: Family, layout: Layout, roles: Mapping[str, Role], tensors: Mapping[str, TensorSpec], counts: Counts
) -> dict[str, Role]:
    """Return ``roles`` with those that follow from the shapes: companions, what is beside, what is unclear."""
    found = dict(roles)
    layers = {role.layer for role in roles.values() if role.kind in ("expert", "fused")}
    layouts = layouts_in(family, layout)
    for name, role in roles.items():
        spec = tensors[name]
        if role.kind == "fused" and role.suffix and _is_single(spec, counts):
            found[name] = replace(role, kind="beside")
        elif role.kind in ("other", "unknown-expert"):
            found[name] = _kind_of(name, role, spec, layouts, role.layer in layers, counts) or role
    return found


def left_uncut(
    family: Family,
    layout: Layout,
    roles: Mapping[str, Role],
    tensors: Mapping[str, TensorSpec],
    counts: Counts,
    now: int,
) -> Iterator[str]:
    """Yield the tensors that may have an entry for each of the experts of ``counts``, those of before a prune.

    There are ``now``: what has as many entries was cut.
    """
    layers = {role.layer for role in roles.values() if role.kind in ("expert", "fused")}
    layouts = layouts_in(family, layout)
    for name, role in roles.items():
        spec = tensors[name]
        if role.kind not in ("other", "companion", "beside", "unclear") or role.projection:
            continue
        if role.kind == "companion" and len(spec.shape) > role.axis and spec.shape[role.axis] == now:
            continue
        read = _kind_of(name, role, spec, layouts, role.layer in layers, counts)
        if read and read.kind in ("companion", "unclear"):
            yield name


def depends_on_top_k(
    family: Family, layout: Layout, roles: Mapping[str, Role], tensors: Mapping[str, TensorSpec], counts: Counts
) -> Iterator[str]:
    """Yield the tensors of a mixture that no family describes and that have as many entries as a token has experts."""
    sizes = {counts.top_k, counts.experts * counts.top_k} - {1, counts.hidden, counts.expert_width, counts.experts}
    layouts = layouts_in(family, layout)
    for name, role in roles.items():
        is_unknown = role.kind in ("other", "unclear") and _is_unknown(name, layouts)
        if is_unknown and sizes & set(tensors[name].shape) and not _A_SHAPE.fullmatch(name):
            yield name


def _kind_of(
    name: str, role: Role, spec: TensorSpec, layouts: tuple[Layout, ...], is_mixture: bool, counts: Counts
) -> Role | None:
    """Return the role of a tensor that is no family's; None where it counts nothing."""
    if is_mixture and (part := _companion(name, layouts)):
        return _as_companion(role, part, spec, counts)
    if role.kind == "unknown-expert":
        return None
    if not (is_mixture and _is_unknown(name, layouts)) and not _SPEAKS_OF_EXPERTS.search(name):
        return None
    if any(layout.whole_pattern.fullmatch(name) for layout in layouts) or _A_SHAPE.fullmatch(name):
        return None
    sizes = {counts.experts}
    if is_mixture and counts.top_k > 1:
        sizes |= {counts.experts * counts.top_k} - {counts.hidden, counts.expert_width, 2 * counts.expert_width}
    is_counted = counts.experts > 1 and bool(sizes & set(spec.shape))
    return replace(role, kind="unclear") if is_counted else None


def _as_companion(role: Role, part: str, spec: TensorSpec, counts: Counts) -> Role:
    shape = spec.shape
    if _is_single(spec, counts):
        return replace(role, kind="beside", suffix=f".{part}")
    if part in ROUTER_SCALES and shape[0] < counts.experts:
        # Blocks of rows: a prune moves rows from one to another. One block holds all of them.
        if shape[0] == 1 and (part in BLOCK_SCALES or counts.experts not in shape):
            return replace(role, kind="beside", suffix=f".{part}")
        return replace(role, kind="unclear")
    axis = 1 if len(shape) == 2 and shape[0] == 1 else 0
    return replace(role, kind="companion", suffix=f".{part}", axis=axis)


def _companion(name: str, layouts: tuple[Layout, ...]) -> str | None:
    for layout in layouts:
        for pattern in layout.companion_patterns:
            if match := pattern.fullmatch(name):
                return match["part"]
    return None


def _is_unknown(name: str, layouts: tuple[Layout, ...]) -> bool:
    """Whether ``name`` is one of a mixture's block, and none that its family has there."""
    return any(layout.block_pattern.fullmatch(name) and not layout.whole_pattern.fullmatch(name) for layout in layouts)


def _is_single(spec: TensorSpec, counts: Counts) -> bool:
    """Whether one value holds for all experts."""
    return math.prod(spec.shape) == 1 and counts.experts > 1
