"""``profile diff``: what an operation, or other text, did to the traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesurgeon.errors import CheckpointError, ProfileError
from moesurgeon.pipeline.provenance import Step, history_of
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.profiling.artefact import Profile, load_profile
from moesurgeon.profiling.difference import difference


def diff(before: Path, after: Path, checkpoint: str | None) -> dict[str, Any]:
    """Compare two profiles; of a pruned ``checkpoint`` the record says which experts are which."""
    old, new = load_profile(before), load_profile(after)
    if old.statistics.layers != new.statistics.layers:
        raise ProfileError(
            f"{before} has experts in {len(old.statistics.layers)} layers, {after} in {len(new.statistics.layers)}, or "
            "in others; compare profiles of one model"
        )
    kept = None if checkpoint is None else _kept(checkpoint, (before, old), (after, new))
    if kept is None and old.statistics.experts != new.statistics.experts:
        raise ProfileError(
            f"{before} has {old.statistics.experts} experts per layer, {after} {new.statistics.experts}: name the "
            "pruned checkpoint with --checkpoint, whose moesurgeon.json says which are which"
        )
    return {
        "before": str(before),
        "after": str(after),
        "experts": [old.statistics.experts, new.statistics.experts],
        "top_k": [old.statistics.top_k, new.statistics.top_k],
        "tokens": [int(of.statistics.seen.sum()) for of in (old, new)],
        "same_text": old.origin.trace_hashes == new.origin.trace_hashes,
        **difference(old.statistics, new.statistics, kept),
    }


def _kept(checkpoint: str, before: tuple[Path, Profile], after: tuple[Path, Profile]) -> dict[int, list[int]]:
    """Return by layer the number that each expert of ``checkpoint`` had in the checkpoint of the profile before."""
    subject = open_subject(checkpoint)
    if subject.fingerprint != after[1].origin.fingerprint:
        raise ProfileError(f"{after[0]} was not taken from {checkpoint}; give the checkpoint that it was taken from")
    steps = list(history_of(subject))
    starts = [step["source"].get("fingerprint") for step in steps]
    if (began := before[1].origin.fingerprint) not in starts:
        raise ProfileError(f"{checkpoint} was not made from the checkpoint that {before[0]} was taken from")
    statistics = before[1].statistics
    kept = {layer: list(range(statistics.experts)) for layer in statistics.layers}
    try:
        for maps in _maps(steps[starts.index(began) :]):
            for layer in kept:
                old = sorted(maps[str(layer)], key=maps[str(layer)].__getitem__)
                kept[layer] = [kept[layer][int(number)] for number in old]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: moesurgeon.json has no usable map of experts; write it again") from error
    if any(len(numbers) != after[1].statistics.experts for numbers in kept.values()):
        raise CheckpointError(f"{checkpoint}: moesurgeon.json keeps another number of experts than {after[0]} has")
    return kept


def _maps(steps: list[Step]) -> list[dict[str, dict[str, int]]]:
    return [op["expert_map"] for step in steps for op in step["operations"] if op.get("operation") == "prune"]
