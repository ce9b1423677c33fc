"""Removing experts: everything that counts experts shrinks in step, the kept ones are renumbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.surgery import edits
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.counts import expert_counts
from moesurgeon.surgery.edits import Output
from moesurgeon.surgery.expert_rules import refuse_renumbered
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.tables import without_experts

Kept = Mapping[int, Sequence[int]]
"""Layer -> experts that stay, in the source's numbering, ascending."""


def plan_prune(source: Anatomy, kept: Kept) -> EditPlan:
    """Plan the removal of every routed expert that is not in ``kept``.

    ``kept`` needs an entry per mixture layer, all of one length: stock runtimes hold one expert count
    for the whole model. Layers for multi-token prediction that ``kept`` leaves out follow the last
    layer. Where a layer chooses by a table from token to experts (DeepSeek-V4), the entries of those that
    go are given to the others. Raises UsageError if the result could not run, CheckpointError where something
    may count experts and nobody knows, or where rules in the config name other experts afterwards.
    """
    kept = with_mtp_layers(source, kept)
    count = check_kept(source, kept)
    numbers = {layer: {old: new for new, old in enumerate(experts)} for layer, experts in kept.items()}
    if count < source.experts:
        refuse_unclear(source)
        refuse_renumbered(source, numbers)
    outputs: dict[str, Output] = {}
    dropped: dict[str, str] = {}
    tables: list[str] = []
    for name, spec in source.tensors.items():
        role = source.roles[name]
        if role.kind in ("fused", "rows", "companion") and role.layer in kept:
            output = edits.select(spec, role.axis, kept[role.layer], rows=source.rows_per_expert(name))
        elif role.kind == "table" and role.layer in kept:
            output = edits.transform(spec, without_experts(spec, source.experts, kept[role.layer]))
            tables.append(name)
        elif role.kind == "expert" and role.layer in kept:
            assert role.expert is not None
            new = numbers[role.layer].get(role.expert)
            if new is None:
                dropped[name] = "its expert was pruned"
                continue
            output = edits.rename(edits.copy(spec), _renumbered(source, name, role.layer, role.expert, new))
        else:
            output = edits.copy(spec)
        outputs[output.spec.name] = output
    if count == source.experts:
        return EditPlan({name: edits.copy(spec) for name, spec in source.tensors.items()})
    record = {
        "operation": "prune",
        "experts": {"before": source.experts, "after": count},
        "expert_map": {str(layer): {str(old): new for old, new in numbers[layer].items()} for layer in sorted(numbers)},
    }
    if tables:
        record["tables"] = {"names": tables, "pruned_entries": "given to those with the fewest"}
    return EditPlan(outputs, dropped, dict.fromkeys(expert_counts(source), count), [record])


def refuse_unclear(source: Anatomy) -> None:
    """Raise CheckpointError for a tensor that may have an entry per expert, and that no family describes."""
    for name, _role in source.of_kind("unclear"):
        raise CheckpointError(
            f"{name} has shape {list(source.tensors[name].shape)}, so it may count the {source.experts} experts, and "
            f"no {source.family.title} checkpoint has it: nobody knows how to cut it; save the checkpoint without it"
        )


def with_mtp_layers(source: Anatomy, kept: Kept) -> dict[int, tuple[int, ...]]:
    """Return ``kept`` in order, with the last layer's choice for layers for multi-token prediction that it leaves out.

    Nothing can be measured there: transformers does not run them. The last layer sees the most similar states.
    """
    last = max(source.moe_layers, default=None)
    followers = [layer for layer in source.mtp_layers if layer not in kept and last in kept]
    chosen = {**kept, **{layer: kept[last] for layer in followers if last is not None}}
    return {layer: tuple(sorted(chosen[layer])) for layer in sorted(chosen)}


def check_kept(source: Anatomy, kept: Kept) -> int:
    """Return the uniform count of ``kept``, or raise UsageError if it breaks the router's rules."""
    check_experts(source, kept, needed=source.routed_layers)
    counts = {len(experts) for experts in kept.values()}
    if len(counts) > 1:
        raise UsageError(
            f"layers keep different counts ({sorted(counts)}): stock runtimes need the same in every layer"
        )
    count = counts.pop()
    check_count(source, count)
    groups, _kept_groups = source.groups
    size = source.experts // groups
    for layer, experts in kept.items():
        if groups > 1 and len({sum(expert // size == group for expert in experts) for group in range(groups)}) > 1:
            raise UsageError(f"layer {layer} keeps different counts in its {groups} routing groups; they must be equal")
    return count


def check_experts(source: Anatomy, kept: Kept, *, needed: Sequence[int]) -> None:
    """Raise UsageError unless ``kept`` names experts that there are, each once, and all ``needed`` layers."""
    missing = [layer for layer in needed if layer not in kept]
    extra = [layer for layer in kept if layer not in source.routed_layers]
    if missing:
        raise UsageError(f"no experts are given for layer {missing[0]}; list every one of {list(source.moe_layers)}")
    if extra:
        raise UsageError(f"layer {extra[0]} has no routed experts; those that have are {list(source.routed_layers)}")
    for layer, experts in kept.items():
        wrong = [expert for expert in experts if not 0 <= expert < source.experts]
        if wrong:
            raise UsageError(f"layer {layer} has no expert {wrong[0]}: they are numbered 0 to {source.experts - 1}")
        if len(set(experts)) < len(experts):
            raise UsageError(f"layer {layer} names an expert twice; name each that stays once")


def check_count(source: Anatomy, count: int) -> None:
    """Raise UsageError if ``count`` experts per layer could not run."""
    if count > source.experts:
        raise UsageError(f"cannot keep {count} experts: the checkpoint has {source.experts}")
    if count < source.top_k:
        raise UsageError(f"keep at least {source.top_k} experts: the checkpoint routes each token to {source.top_k}")
    groups, kept_groups = source.groups
    rule = source.family.router.groups
    least = rule.least if rule else 1
    if count % groups or count // groups < least:
        fitting = [
            n for n in range(least * groups, source.experts + 1, groups) if source.top_k <= kept_groups * n // groups
        ]
        raise UsageError(
            f"{count} experts do not fit the routing groups ({groups}, the same number in each, at least {least}); "
            f"possible are {', '.join(map(str, fitting))}"
        )
    if source.top_k > kept_groups * (count // groups):
        raise UsageError(
            f"{count} experts leave {kept_groups * (count // groups)} in the {kept_groups} groups that a token sees, "
            f"but it is routed to {source.top_k}; keep more"
        )


def _renumbered(source: Anatomy, name: str, layer: int, old: int, new: int) -> str:
    assert source.layout.expert is not None
    template = source.name_in(layer, source.layout.expert)
    return name.replace(template.replace("{expert}", str(old)), template.replace("{expert}", str(new)), 1)
