"""Is everything there? Counts, shapes and names held against the config; headers only.

A missing expert tensor is what serving runtimes load without a word, so every gap is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from moesurgeon.families.keys import count_of
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.expected import PACKED, differing_tensors


def problems_of(anatomy: Anatomy) -> list[str]:
    """Return what contradicts the config or is missing, one line each; empty if all is well."""
    return [
        *_of_layers(anatomy),
        *_of_experts(anatomy),
        *_of_rows(anatomy),
        *_of_routing(anatomy),
        *(_gaps(anatomy) if anatomy.family.parts is None else ()),
        *_of_ends(anatomy),
        *differing_tensors(anatomy),
    ]


def _of_layers(anatomy: Anatomy) -> Iterator[str]:
    expected = anatomy.family.moe_layers.of(anatomy.config, anatomy.layers)
    if expected != anatomy.moe_layers:
        missing = sorted(set(expected) - set(anatomy.moe_layers))
        extra = sorted(set(anatomy.moe_layers) - set(expected))
        if missing:
            yield f"layers {_few(missing)} should have experts by config.json, but hold none; shards are missing"
        if extra:
            yield f"layers {_few(extra)} hold experts, but config.json makes them dense"
    # Extra layers that have names of their own are what they say; those that are numbered on must be counted.
    pattern, named = anatomy.family.layer_pattern, bool(anatomy.family.mtp_layer)
    last = anatomy.layers + (0 if named else count_of(anatomy.config, anatomy.family.mtp_key, 0))
    beyond = sorted(
        layer for layer, names in anatomy.by_layer.items() if layer >= last and any(map(pattern.fullmatch, names))
    )
    if beyond:
        yield f"config.json counts {anatomy.layers} layers, but layers {_few(beyond)} are stored as well"
    stored = {layer for layer in anatomy.by_layer if layer < anatomy.layers}
    if len(stored) != anatomy.layers:
        yield f"config.json counts {anatomy.layers} layers, the shards hold {len(stored)} of them"


def _of_experts(anatomy: Anatomy) -> Iterator[str]:
    for layer in anatomy.routed_layers:
        found: dict[int, set[tuple[str, str]]] = {}
        fused: set[str] = set()
        for name, role in anatomy.of_kind("expert", "fused", layer=layer):
            if role.kind == "fused":
                fused.add(role.projection or "")
                yield from _of_fused_shape(anatomy, name, role.projection or "", role.suffix)
            elif role.expert is not None:
                found.setdefault(role.expert, set()).add((role.projection or "", role.suffix))
                yield from _of_expert_shape(anatomy, name, role.projection or "", role.suffix)
        if found and sorted(found) != list(range(anatomy.experts)):
            yield f"layer {layer} holds {_span(sorted(found))}, config.json counts {anatomy.experts} experts"
        everything = set().union(*found.values())
        for projection in sorted(
            set(anatomy.layout.projections) - {projection for projection, _ in everything} - fused
        ):
            yield f"layer {layer} lacks {anatomy.layout.projections[projection]} of every expert; a shard is missing"
        for expert, parts in sorted(found.items()):
            if parts != everything:
                projection, suffix = sorted(everything - parts)[0]
                stored = anatomy.layout.projections[projection]
                yield f"layer {layer} expert {expert} lacks {stored}{suffix}; a shard is missing or was cut"
    for name, _role in anatomy.of_kind("unknown-expert"):
        yield f"{name} belongs to the experts, but a {anatomy.family.title} checkpoint has no such tensor"


def _of_fused_shape(anatomy: Anatomy, name: str, projection: str, suffix: str) -> Iterator[str]:
    shape = anatomy.tensors[name].shape
    rows = anatomy.rows_per_expert(name)
    if not shape or shape[0] != anatomy.experts * rows:
        if rows > 1:
            yield f"{name} has shape {list(shape)}, config.json makes it {[anatomy.experts * rows, anatomy.hidden]}"
            return
        yield f"{name} holds {shape[0] if shape else 0} experts, config.json counts {anatomy.experts}"
    elif suffix in ("", ".weight") and anatomy.tensors[name].dtype not in PACKED:
        wide, high = anatomy.expert_width, anatomy.hidden
        expected = (high, wide) if projection == "down" else (2 * wide, high)
        if anatomy.layout.transposed:
            expected = (expected[1], expected[0])
        if rows > 1:
            if shape[1:] != (high,):
                yield f"{name} has shape {list(shape)}, config.json makes it {[anatomy.experts * rows, high]}"
        elif shape[1:] != expected:
            yield f"{name} has shape {list(shape)}, config.json makes it {[anatomy.experts, *expected]}"


def _of_expert_shape(anatomy: Anatomy, name: str, projection: str, suffix: str) -> Iterator[str]:
    if suffix != ".weight" or anatomy.tensors[name].dtype in PACKED:
        return  # scales have their own shapes, packed weights too
    wide, high = anatomy.expert_width, anatomy.hidden
    expected = (high, wide) if projection == "down" else (wide, high)
    if anatomy.tensors[name].shape != expected:
        yield f"{name} has shape {list(anatomy.tensors[name].shape)}, config.json makes it {list(expected)}"


def _of_rows(anatomy: Anatomy) -> Iterator[str]:
    rows = {layer: dict(anatomy.of_kind("rows", layer=layer)) for layer in anatomy.routed_layers}
    parts = {layer: {_in_layer(anatomy, name, layer) for name in names} for layer, names in rows.items()}
    for layer, names in rows.items():
        by_table = any(anatomy.of_kind("table", layer=layer))  # such a layer has no bias to choose with
        for part in sorted(set().union(*parts.values()) - parts[layer]):
            if not by_table and not part.endswith(".weight"):
                yield f"layer {layer} lacks {part}, which others have; a shard is missing or was cut"
        if not any(name.endswith(".weight") for name in names):
            yield f"layer {layer} has experts but no router weight; a shard is missing or was cut"
        for name, role in names.items():
            shape = anatomy.tensors[name].shape
            if len(shape) <= role.axis or shape[role.axis] != anatomy.experts:
                yield f"{name} has shape {list(shape)}, config.json counts {anatomy.experts} experts"
    for name, role in anatomy.of_kind("companion"):
        shape = anatomy.tensors[name].shape
        if len(shape) <= role.axis or shape[role.axis] != anatomy.experts:
            yield f"{name} has shape {list(shape)}, config.json counts {anatomy.experts} experts; it was not cut along"


def _of_routing(anatomy: Anatomy) -> Iterator[str]:
    for name, _role in anatomy.of_kind("table"):
        shape = anatomy.tensors[name].shape
        if len(shape) != 2 or shape[1] != anatomy.top_k or anatomy.tensors[name].dtype not in ("I32", "I64"):
            yield f"{name} has shape {list(shape)}, config.json makes it [vocabulary, {anatomy.top_k}] integers"
    if anatomy.top_k > anatomy.experts:
        yield f"config.json asks for the top {anatomy.top_k} of {anatomy.experts} experts"
    count, kept = anatomy.groups
    rule = anatomy.family.router.groups
    if rule:
        if anatomy.experts % count:
            yield f"{anatomy.experts} experts do not divide into {count} routing groups"
        elif anatomy.experts // count < rule.least:
            yield f"{anatomy.experts} experts are too few for {count} routing groups of at least {rule.least}"
        elif anatomy.top_k > kept * (anatomy.experts // count):
            yield f"top {anatomy.top_k} does not fit into {kept} groups of {anatomy.experts // count} experts"


def _gaps(anatomy: Anatomy) -> Iterator[str]:
    """Tensors outside the experts that nearly all layers have and one lacks."""
    relative: dict[int, set[str]] = {}
    for name, role in anatomy.of_kind("other", "shared"):
        if role.layer is not None and role.layer < anatomy.layers:
            relative.setdefault(role.layer, set()).add(_in_layer(anatomy, name, role.layer))
    kinds: dict[tuple[Any, ...], set[int]] = {}
    moe_layers = set(anatomy.moe_layers)
    for layer in relative:
        kinds.setdefault((layer in moe_layers, *_mixers(anatomy, layer)), set()).add(layer)
    for layers in kinds.values():
        counts = Counter(part for layer in layers for part in relative.get(layer, ()))
        for part, count in sorted(counts.items()):
            if len(layers) > 2 and len(layers) - 1 == count:
                layer = next(layer for layer in sorted(layers) if part not in relative.get(layer, ()))
                yield f"layer {layer} lacks {part}, which every other layer has; a shard is missing or was cut"


def _mixers(anatomy: Anatomy, layer: int) -> tuple[str, ...]:
    """Return which of several kinds of attention ``layer`` has; () where the family has one kind only."""
    if len(anatomy.family.attention) == 1:
        return ()
    names = anatomy.by_layer.get(layer, ())
    prefixes = (prefix.replace("{layer}", str(layer)) for prefix in anatomy.family.attention)
    return tuple(
        kind
        for kind, prefix in zip(anatomy.family.attention, prefixes, strict=True)
        if any(name.startswith(prefix) for name in names)
    )


def _in_layer(anatomy: Anatomy, name: str, layer: int) -> str:
    """Return ``name`` without its layer's prefix."""
    return name.removeprefix(anatomy.name_in(layer, anatomy.family.layer) + ".")


def _few(numbers: list[int]) -> str:
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"{numbers[:8]}{more}"


def _of_ends(anatomy: Anatomy) -> Iterator[str]:
    """What is there once: embedding, last norm, head."""
    needed = [anatomy.family.embedding, anatomy.family.final_norm]
    if not anatomy.config.get("tie_word_embeddings", anatomy.family.tied_by_default):
        needed.append(anatomy.family.head)
    for name in needed:
        if name not in anatomy.tensors:
            yield f"{name} is missing; a shard is missing or was cut"


def _span(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"experts {numbers[0]} to {numbers[-1]}"
    return f"{len(numbers)} experts between {numbers[0]} and {numbers[-1]}, with gaps"
