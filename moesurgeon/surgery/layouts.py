"""The same weights stored another way: expert by expert, fused, or as a sibling family.

Joining and splitting are byte ranges: the fused gate_up_proj[e] is gate [F, H] and then up [F, H], so
expert tensors laid end to end are the fused tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import UsageError
from moesurgeon.families import Layout
from moesurgeon.families.keys import REMOVED
from moesurgeon.families.remap import REMAPS, Remap
from moesurgeon.surgery import edits
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.edits import Output
from moesurgeon.surgery.exact import doubled
from moesurgeon.surgery.plan import EditPlan, compose, identity

LAYOUTS = ("per-expert", "fused", *(remap.layout for remap in REMAPS))


def plan_layout(source: Anatomy, layout: str) -> EditPlan:
    """Plan to store ``source`` in ``layout``; the model computes the same.

    Raises UsageError if the family has no such layout or the experts are quantised.
    """
    for remap in REMAPS:
        if remap.layout == layout:
            return _remapped(source, remap)
    known = {candidate.name: candidate for candidate in source.family.layouts}
    if layout not in known:
        possible = [*known, *(remap.layout for remap in REMAPS if remap.source is source.family)]
        raise UsageError(f"{source.family.title} has no layout {layout!r}; it has {', '.join(possible)}")
    target = known[layout]
    if target is source.layout:
        return identity(source)
    for name, role in source.of_kind("expert", "fused"):
        if role.suffix not in ("", ".weight"):
            raise UsageError(f"quantised experts cannot change their layout ({name}); leave out --layout")
    outputs = {output.spec.name: output for output in _moved(source, target)}
    return EditPlan(outputs, record=[{"operation": "layout", "layout": layout}])


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
    prefix = source.name_in(layer, target.fused, target)
    wide, high = pieces[0, "gate"].shape
    both = [pieces[expert, part] for expert in range(source.experts) for part in ("gate", "up")]
    down = [pieces[expert, "down"] for expert in range(source.experts)]
    yield edits.join(prefix + target.projections["gate_up"], both, (source.experts, 2 * wide, high))
    yield edits.join(prefix + target.projections["down"], down, (source.experts, high, wide))


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


def _remapped(source: Anatomy, remap: Remap) -> EditPlan:
    """Plan to store ``source`` as the sibling family of ``remap`` (per expert)."""
    if source.family is not remap.source:
        raise UsageError(f"{remap.layout} is a layout for {remap.source.title}, not for {source.family.title}")
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
    config = {**values, **dict.fromkeys(removed, REMOVED)}
    return compose(before, EditPlan(outputs, config=config, record=[{"operation": "layout", "layout": remap.layout}]))
