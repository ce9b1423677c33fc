"""The full list of what a layer and the ends of a model must hold besides experts, held against what is stored.

From the family's ``parts``, so that headers are enough. A quantised weight counts as there under any of the names
that quantisers give it, and its shape is its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from moesurgeon.families.keys import value_at
from moesurgeon.families.parts import shape_of
from moesurgeon.surgery.anatomy import Anatomy

# Several weights in one element: shapes are not those of the config.
PACKED = ("U8", "I8", "I32", "F4")


def differing_tensors(anatomy: Anatomy) -> Iterator[str]:
    """Yield what is missing or has another shape than the config asks for: a line for each part, with its layers."""
    if anatomy.family.parts is None:
        return
    missing: dict[str, list[int]] = {}
    other: dict[str, list[tuple[int, str]]] = {}
    for layer in _stored_layers(anatomy):
        for part, shape in expected_in(anatomy, layer).items():
            name = f"{anatomy.name_in(layer, anatomy.family.layer)}.{part}"
            if not _is_stored(anatomy, name):
                missing.setdefault(part, []).append(layer)
            elif difference := _difference(anatomy, name, shape):
                other.setdefault(part, []).append((layer, difference))
    for part, layers in missing.items():
        yield (
            f"layer {layers[0]} lacks {part}; a shard is missing or was cut"
            if len(layers) == 1
            else f"{len(layers)} layers ({_few(layers)}) lack {part}; a shard is missing or was cut"
        )
    for part, found in other.items():
        more = f" (and {len(found) - 1} layers more)" if len(found) > 1 else ""
        yield f"layer {found[0][0]} {part} {found[0][1]}{more}"
    yield from _ends(anatomy)


def unexpected_tensors(anatomy: Anatomy) -> list[str]:
    """Return the tensors of layers that the config gives no place; companions of quantised weights have one."""
    if anatomy.family.parts is None:
        return []
    # Which of a layer's projections a bias key is for differs; where one is set, biases are not judged.
    biased = any(key.endswith("bias") and value for key, value in _scope(anatomy).items())
    found = []
    for layer in _stored_layers(anatomy):
        expected = expected_in(anatomy, layer)
        prefix = anatomy.name_in(layer, anatomy.family.layer) + "."
        modules = tuple(f"{prefix}{part.removesuffix('weight')}" for part in expected if part.endswith(".weight"))
        for name in anatomy.by_layer.get(layer, ()):
            if anatomy.roles[name].kind not in ("other", "shared") or name.removeprefix(prefix) in expected:
                continue
            if name.endswith((".inv_freq", "_scale", ".k_zero_point", ".v_zero_point")):
                continue  # frequencies that old transformers stored; scales of a quantised cache
            if name.endswith(".bias"):
                if not biased and not _is_quantised(anatomy):
                    found.append(name)
            elif not name.startswith(modules):
                found.append(name)
    return found


def expected_in(anatomy: Anatomy, layer: int) -> dict[str, tuple[int | None, ...]]:
    """Return names below ``layer``, and shapes, of what it must hold besides routed experts and their router."""
    family, config, prefix = anatomy.family, _scope(anatomy), anatomy.name_in(layer, anatomy.family.layer) + "."
    block = anatomy.layout.block.removeprefix(family.layer + ".")
    stored = anatomy.by_layer.get(layer, ())
    found: dict[str, tuple[int | None, ...]] = {}
    for parts in family.parts or ():
        if parts.on == "ends":
            continue
        if parts.on == "moe" and layer not in anatomy.moe_layers:
            continue
        if parts.on == "dense" and layer in anatomy.moe_layers:
            continue
        kind = parts.on.removeprefix("has:")
        if kind != parts.on and not any(name.startswith(prefix + kind) for name in stored):
            continue
        if parts.apply(config, family.size_defaults):
            found |= {
                name.replace("{block}", block): shape_of(sizes, config, family.size_defaults)
                for name, sizes in parts.names.items()
            }
    return found


def _ends(anatomy: Anatomy) -> Iterator[str]:
    family, config = anatomy.family, _scope(anatomy)
    vocabulary = shape_of("vocab_size", config, {})[0]
    vocabulary = vocabulary if vocabulary is not None else shape_of("vocab_size", anatomy.config, {})[0]
    for name, shape in (
        (family.embedding, (vocabulary, anatomy.hidden)),
        (family.final_norm, (anatomy.hidden,)),
        (family.head, (vocabulary, anatomy.hidden)),
    ):
        if name in anatomy.tensors and (difference := _difference(anatomy, name, shape)):
            yield f"{name} {difference}"
    for parts in family.parts or ():
        if parts.on == "ends" and parts.apply(config, family.size_defaults):
            for name, sizes in parts.names.items():
                if name not in anatomy.tensors:
                    yield f"{name} is missing; a shard is missing or was cut"
                elif difference := _difference(anatomy, name, shape_of(sizes, config, family.size_defaults)):
                    yield f"{name} {difference}"
    if len(family.attention) > 1:
        for layer in _stored_layers(anatomy):
            prefixes = tuple(prefix.replace("{layer}", str(layer)) for prefix in family.attention)
            if not any(name.startswith(prefixes) for name in anatomy.by_layer.get(layer, ())):
                yield f"layer {layer} holds nothing that mixes tokens ({', '.join(prefixes)}); a shard is missing"


def _stored_layers(anatomy: Anatomy) -> list[int]:
    """Return the layers that hold anything; of those that hold nothing the count is another problem, and untrusted."""
    return sorted(layer for layer in anatomy.by_layer if layer < anatomy.layers)


def _scope(anatomy: Anatomy) -> dict[str, object]:
    """Return the part of the config that is about the text model."""
    inner = anatomy.family.layers_key.rpartition(".")[0]
    return dict(value_at(anatomy.config, inner) or {}) if inner else dict(anatomy.config)


def _is_stored(anatomy: Anatomy, name: str) -> bool:
    if name in anatomy.tensors:
        return True
    module = name.removesuffix("weight")
    return module != name and any(
        other.startswith(module) and not other.endswith(".bias") for other in _in_layer_of(anatomy, name)
    )


def _in_layer_of(anatomy: Anatomy, name: str) -> tuple[str, ...]:
    match = anatomy.family.layer_pattern.fullmatch(name)
    return anatomy.by_layer.get(int(match["layer"]), ()) if match else ()


def _difference(anatomy: Anatomy, name: str, shape: tuple[int | None, ...]) -> str | None:
    spec = anatomy.tensors.get(name)
    if spec is None or spec.dtype in PACKED:
        return None
    if len(spec.shape) == len(shape) and all(
        size in (None, there) for size, there in zip(shape, spec.shape, strict=True)
    ):
        return None
    said = ", ".join("?" if size is None else str(size) for size in shape)
    return f"has shape {list(spec.shape)}, config.json makes it [{said}]"


def _is_quantised(anatomy: Anatomy) -> bool:
    return bool(anatomy.config.get("quantization_config") or anatomy.config.get("compression_config"))


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
