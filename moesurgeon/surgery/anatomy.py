"""What a checkpoint is made of: its family, its numbers, and the role of every tensor.

Built from a config and a table of tensor specs, so it describes a checkpoint on disk and the result
of a plan that has not been written alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import CheckpointError
from moesurgeon.families import FAMILIES, Family, Layout, families_of
from moesurgeon.families.keys import count_of, is_present, value_at
from moesurgeon.surgery.companions import Counts, depends_on_top_k, left_uncut, with_companions
from moesurgeon.surgery.roles import Kind, Role, roles_by_name

__all__ = ["Anatomy", "Role", "examine"]

_PROJECTION_KINDS: tuple[Kind, ...] = ("expert", "fused")


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint seen as a mixture of experts.

    ``moe_layers`` are those of the model proper, ``mtp_layers`` the extra mixture layers behind them
    (multi-token prediction), numbered on whatever their names are: ``mtp.0`` is the layer after the last.
    ``roles`` has an entry for every tensor. ``top_ks``: experts per token, layer by layer; ``top_k`` is the
    largest of them.
    """

    family: Family
    layout: Layout
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    roles: Mapping[str, Role]
    layers: int
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    experts: int
    top_k: int
    top_ks: tuple[int, ...]
    hidden: int
    expert_width: int

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """All layers with routed experts, those for multi-token prediction included."""
        return self.moe_layers + self.mtp_layers

    @property
    def shared_experts(self) -> int:
        """How many shared experts the config counts; 1 where a family always has one."""
        if self.family.shared_key:
            return count_of(self.config, self.family.shared_key, 0)
        return int(any(role.kind == "shared" for role in self.roles.values()))

    def rows_per_expert(self, name: str) -> int:
        """Return how many entries of its axis each expert has in the tensor ``name``: more than one where flat."""
        return self.expert_width if self.layout.name == "flat" and self.roles[name].kind == "fused" else 1

    @property
    def groups(self) -> tuple[int, int]:
        """(number of routing groups, groups kept); (1, 1) where routing is not grouped."""
        return self.family.router.group_counts(self.config)

    @property
    def renormalises(self) -> bool:
        """Whether the gate divides the chosen weights by their sum."""
        return self.family.router.renormalises(self.config, self.top_k)

    def left_uncut(self, experts: int) -> Iterator[str]:
        """Yield the tensors outside the family's description that may still count ``experts``, those before a prune."""
        return left_uncut(self.family, self.layout, self.roles, self.tensors, self._counts(experts), self.experts)

    def depending_on_top_k(self) -> Iterator[str]:
        """Yield the tensors outside the family's description that may have an entry for each expert of a token."""
        return depends_on_top_k(self.family, self.layout, self.roles, self.tensors, self._counts(self.experts))

    def _counts(self, experts: int) -> Counts:
        return Counts(experts=experts, top_k=self.top_k, hidden=self.hidden, expert_width=self.expert_width)

    @cached_property
    def by_layer(self) -> Mapping[int, tuple[str, ...]]:
        """Names of the tensors of each layer."""
        found: dict[int, list[str]] = {}
        for name, role in self.roles.items():
            if role.layer is not None:
                found.setdefault(role.layer, []).append(name)
        return {layer: tuple(names) for layer, names in found.items()}

    def of_kind(self, *kinds: Kind, layer: int | None = None) -> Iterator[tuple[str, Role]]:
        """Yield (name, role) of the tensors of these kinds, of one layer or of all."""
        names = self.tensors if layer is None else self.by_layer.get(layer, ())
        for name in names:
            if self.roles[name].kind in kinds:
                yield name, self.roles[name]

    def name_in(self, layer: int, template: str, layout: Layout | None = None) -> str:
        """Return a name of ``layout`` (by default this checkpoint's) in ``layer``, which may be for multi-token
        prediction; an ``{expert}`` stays."""
        name = template.replace("{block}", (layout or self.layout).block)
        if layer >= self.layers and self.family.mtp_layer:
            name = name.replace(self.family.layer, self.family.mtp_layer[0], 1)
            layer -= self.layers
        return name.replace("{layer}", str(layer))

    def router_weight(self, layer: int) -> str:
        """Return the name of the router's weight [E, H] of ``layer``."""
        for name, _role in self.of_kind("rows", layer=layer):
            if name.endswith(".weight"):
                return name
        raise CheckpointError(f"layer {layer} has experts but no router weight; the checkpoint is incomplete")


def examine(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Anatomy:
    """Recognise the family and the role of every tensor.

    Raises UnknownFamily or CheckpointError (also for a dense model); :func:`problems_of` in
    ``surgery.completeness`` tells whether everything that should be there is.
    """
    known = [key for family in FAMILIES for key in family.top_k_keys]
    if not any(is_present(config, key) for key in known) and not any(".experts." in name for name in tensors):
        kind = str(config.get("model_type"))[:60]
        raise CheckpointError(f"this {kind} checkpoint is a dense model: it has no experts, so there is nothing to do")
    family, layout = _layout_of(families_of(config), tensors)
    layers = _number(config, (family.layers_key,))
    top_ks = _top_ks(config, family, layers)
    experts, hidden = _number(config, family.experts_keys), _number(config, (family.hidden_key,))
    width = _number(config, (family.expert_width_key,))
    counts = Counts(experts=experts, top_k=max(top_ks), hidden=hidden, expert_width=width)
    roles = with_companions(family, layout, roles_by_name(family, layout, layers, tensors), tensors, counts)
    expert_layers = sorted(
        {role.layer for role in roles.values() if role.kind in _PROJECTION_KINDS and role.layer is not None}
    )
    return Anatomy(
        family=family,
        layout=layout,
        config=config,
        tensors=tensors,
        roles=roles,
        layers=layers,
        moe_layers=tuple(layer for layer in expert_layers if layer < layers),
        mtp_layers=tuple(layer for layer in expert_layers if layer >= layers),
        experts=experts,
        top_k=max(top_ks),
        top_ks=top_ks,
        hidden=hidden,
        expert_width=width,
    )


def _layout_of(families: tuple[Family, ...], tensors: Mapping[str, TensorSpec]) -> tuple[Family, Layout]:
    found = [
        (family, layout)
        for family in families
        for layout in family.layouts
        if any(layout.expert_pattern.fullmatch(name) or layout.fused_pattern.fullmatch(name) for name in tensors)
    ]
    if not found:
        raise CheckpointError(
            f"config.json says {families[0].title}, but no tensor is named like its experts: "
            "the weights are another model's"
        )
    if len(found) > 1:
        raise CheckpointError("experts are stored both one by one and fused; the folder mixes two checkpoints")
    return found[0]


def _top_ks(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int, ...]:
    """Return the experts per token of each layer: mostly one number, in some families a list."""
    if family.fixed_top_k is not None:
        return (family.fixed_top_k,) * max(1, layers)
    for key in family.top_k_keys:
        value = value_at(config, key)
        if isinstance(value, list):
            if len(value) != layers:
                raise CheckpointError(f"config.json gives {key} for {len(value)} layers, not for {layers}; restore it")
            return tuple(_number({key: each}, (key,)) for each in value)
    return (_number(config, family.top_k_keys),) * max(1, layers)


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """Return the positive integer under the first of ``keys`` that is present."""
    values = {key: count_of(config, key, 0) for key in keys if value_at(config, key) is not None}
    if not values:
        raise CheckpointError(f"config.json lacks {keys[0]}; restore it")
    if len(set(values.values())) > 1:
        said = " and ".join(f"{key} = {value}" for key, value in values.items())
        raise CheckpointError(f"config.json contradicts itself: {said}; keep one of them")
    key, value = next(iter(values.items()))
    if value == 0:
        raise CheckpointError(f"config.json gives {key} = 0; restore it")
    return value
