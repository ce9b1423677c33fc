"""The same weights stored another way: expert by expert, fused, or as a sibling family.

Joining and splitting are byte ranges: the fused gate_up_proj[e] is gate [F, H] and then up [F, H], so
expert tensors laid end to end are the fused tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import UsageError
from moesurgeon.families import Layout
from moesurgeon.families.keys import REMOVED, value_at
from moesurgeon.families.remap import REMAPS, Remap
from moesurgeon.surgery import edits
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.edits import Output
from moesurgeon.surgery.exact import doubled
from moesurgeon.surgery.plan import EditPlan, compose, identity

# Where a quantiser says which modules it quantised.
_RULES = ("quantization_config", "compression_config", "text_config.quantization_config")

LAYOUTS = ("per-expert", "fused", *(remap.layout for remap in REMAPS))


def plan_layout(source: Anatomy, layout: str, *, biases: bool = True) -> EditPlan:
    """Plan to store ``source`` in ``layout``; the model computes the same.

    ``biases``: give a sibling family the zero biases that some runtime has whatever the config says. Raises UsageError
    if the family has no such layout or the experts are quantised.
    """
    for remap in REMAPS:
        if remap.layout == layout:
            return _remapped(source, remap, biases=biases)
    known = {candidate.name: candidate for candidate in source.family.layouts}
    if layout not in known:
        possible = [*known, *(remap.layout for remap in REMAPS if remap.source is source.family)]
        raise UsageError(f"{source.family.title} has no layout {layout!r}; it has {', '.join(possible)}")
    target = known[layout]
    if target is source.layout:
        return identity(source)
    refuse_unmovable(source)
    outputs = {output.spec.name: output for output in _moved(source, target)}
    return EditPlan(outputs, record=[{"operation": "layout", "layout": layout}])


def refuse_unmovable(source: Anatomy) -> None:
    """Raise UsageError where experts or router have parts, or the config rules, that another layout has no name for."""
    for name, role in source.of_kind("expert", "fused", "beside"):
        if role.suffix not in ("", ".weight"):
            what = "experts" if role.projection else "routers"
            raise UsageError(f"quantised {what} cannot change their layout ({name}); leave out --layout")
    for name, _role in source.of_kind("companion", "unclear"):
        raise UsageError(
            f"{name} is of a mixture, and no {source.family.title} checkpoint has it: another layout has no name for "
            "it; leave out --layout"
        )
    for key in _RULES:
        if value_at(source.config, key) is not None:
            raise UsageError(
                f"{key} in config.json names modules by the names that they have now, and another layout has others; "
                "leave out --layout"
            )


def _moved(source: Anatomy, target: Layout) -> Iterator[Output]:
    """Yield the outputs of a change between the per-expert and the fused layout."""
    for name, spec in source.tensors.items():
        role = source.roles[name]
        if role.kind not in ("expert", "fused"):
            yield edits.rename(edits.copy(spec), _moved_name(source, target, name))
    for layer in source.routed_layers:
        yield from (_fused if target.expert is None else _unfused)(source, target, layer)


def _moved_name(source: Anatomy, target: Layout, name: str) -> str:
    """Return what ``target`` calls ``name``, which is no expert's: by its place among the rows, or by its block."""
    role = source.roles[name]
    if role.layer is None:
        return name
    old_block, new_block = (source.name_in(role.layer, layout.block) for layout in (source.layout, target))
    if role.kind == "rows":
        for old, new in zip(source.layout.per_expert_rows, target.per_expert_rows, strict=True):
            if name == old.replace("{block}", old_block):
                return new.replace("{block}", new_block)
    return name.replace(old_block, new_block, 1) if name.startswith(old_block + ".") else name


def _fused(source: Anatomy, target: Layout, layer: int) -> Iterator[Output]:
    pieces: dict[tuple[int, str], TensorSpec] = {}
    for name, role in source.of_kind("expert", layer=layer):
        assert role.expert is not None and role.projection is not None
        pieces[role.expert, role.projection] = source.tensors[name]
    for projections in (("gate", "up"), ("down",)):
        _refuse_mixed(source, layer, {key: spec for key, spec in pieces.items() if key[1] in projections})
    prefix = source.name_in(layer, target.fused, target)
    wide, high = pieces[0, "gate"].shape
    both = [pieces[expert, part] for expert in range(source.experts) for part in ("gate", "up")]
    down = [pieces[expert, "down"] for expert in range(source.experts)]
    yield edits.join(prefix + target.projections["gate_up"], both, (source.experts, 2 * wide, high))
    yield edits.join(prefix + target.projections["down"], down, (source.experts, high, wide))


def _refuse_mixed(source: Anatomy, layer: int, pieces: Mapping[tuple[int, str], TensorSpec]) -> None:
    """Raise UsageError where ``pieces``, which would be one tensor, are stored in several dtypes."""
    dtypes = Counter(spec.dtype for spec in pieces.values())
    if len(dtypes) == 1:
        return
    usual = dtypes.most_common(1)[0][0]
    (expert, projection), other = next((key, spec) for key, spec in sorted(pieces.items()) if spec.dtype != usual)
    raise UsageError(
        f"layer {layer}: its experts are stored in {' and '.join(sorted(dtypes))} (expert {expert}, {projection}: "
        f"{other.dtype}), and one fused tensor has one dtype{_also(source, layer)}; leave out --layout, or convert the "
        "experts to one dtype first"
    )


def _also(source: Anatomy, layer: int) -> str:
    """Say which layers after ``layer`` have experts of several dtypes as well."""
    others = [
        other
        for other in source.routed_layers
        if other > layer and len({source.tensors[name].dtype for name, _ in source.of_kind("expert", layer=other)}) > 1
    ]
    if not others:
        return ""
    named = ", ".join(map(str, others[:8])) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    return f" (also: layer{'s' if len(others) > 1 else ''} {named})"


def _unfused(source: Anatomy, target: Layout, layer: int) -> Iterator[Output]:
    fused = {role.projection: source.tensors[name] for name, role in source.of_kind("fused", layer=layer)}
    assert target.expert is not None
    prefix = source.name_in(layer, target.expert, target)
    _experts, high, wide = fused["down"].shape
    for expert in range(source.experts):
        for part, role, place, count, shape in (
            ("gate", "gate_up", 2 * expert, 2 * source.experts, (wide, high)),
            ("up", "gate_up", 2 * expert + 1, 2 * source.experts, (wide, high)),
            ("down", "down", expert, source.experts, (high, wide)),
        ):
            size = fused[role].nbytes // count
            name = prefix.replace("{expert}", str(expert)) + target.projections[part] + ".weight"
            yield edits.split(fused[role], name, place * size, (place + 1) * size, shape)


def _remapped(source: Anatomy, remap: Remap, *, biases: bool) -> EditPlan:
    """Plan to store ``source`` as the sibling family of ``remap`` (per expert)."""
    if source.family is not remap.source:
        raise UsageError(f"{remap.layout} is a layout for {remap.source.title}, not for {source.family.title}")
    refuse_unmovable(source)
    before = plan_layout(source, "per-expert")
    source = before.result(source)
    values, removed = remap.config(source.config)
    target = next(layout for layout in remap.target.layouts if layout.name == "per-expert")
    assert source.layout.shared is not None and target.shared is not None
    outputs: dict[str, Output] = {}
    for name, spec in source.tensors.items():
        output = edits.copy(spec)
        if source.roles[name].kind == "shared":
            layer = str(source.roles[name].layer)
            old = source.layout.shared.replace("{block}", source.layout.block).replace("{layer}", layer)
            new = target.shared.replace("{block}", target.block).replace("{layer}", layer)
            if name == old + remap.doubled:
                output = edits.transform(spec, doubled(spec))
                gate = remap.zero_gate.replace("{block}", target.block).replace("{layer}", layer)
                zeros = TensorSpec(gate, spec.dtype, (1, source.hidden))
                outputs[gate] = edits.add(zeros, partial(bytes, zeros.nbytes), key="zeros", beside=name)
            output = edits.rename(output, name.replace(old, new, 1))
        outputs[output.spec.name] = output
    config = {**values, **dict.fromkeys(removed, REMOVED), remap.bias_key: biases}
    record = {"operation": "layout", "layout": remap.layout}
    if biases:
        outputs |= {output.spec.name: output for output in _zero_biases(source, remap)}
        record["biases"] = "zeros"
    return compose(before, EditPlan(outputs, config=config, record=[record]))


def _zero_biases(source: Anatomy, remap: Remap) -> Iterator[Output]:
    """Yield biases of zeros for the projections of ``remap``, in the dtype of their weights."""
    for layer in range(source.layers):
        for projection in remap.zero_biases:
            weight = source.name_in(layer, f"{source.family.layer}.{projection}.weight")
            bias = f"{weight.removesuffix('weight')}bias"
            spec = source.tensors.get(weight)
            if spec is None or bias in source.tensors or spec.dtype not in ("BF16", "F16", "F32"):
                what = "is missing" if spec is None else f"is stored as {spec.dtype}, or has a bias already"
                raise UsageError(f"{weight} {what}, so it gets no bias of zeros; leave out --layout")
            zeros = TensorSpec(bias, spec.dtype, spec.shape[:1])
            yield edits.add(zeros, partial(bytes, zeros.nbytes), key="zeros", beside=weight)
