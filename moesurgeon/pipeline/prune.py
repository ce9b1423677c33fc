"""``prune``: choose the experts that stay, and write the checkpoint without the others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgeon.checkpoint.open import CONFIG_NAME
from moesurgeon.errors import InputError, NothingToDo, ProfileError, UsageError
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.write import finish, refuse_output
from moesurgeon.progress import SILENT, Progress
from moesurgeon.runtime.parallel import parallel_warnings
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import Kept, check_count, plan_prune

if TYPE_CHECKING:
    from moesurgeon.profiling.artefact import Profile

_KEPT = '{"LAYER": [expert, ...]}'


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """How many experts stay and by what they are chosen.

    Either ``keep_experts`` (a file with the choice) or ``profile`` with ``keep`` (a count per layer)
    or ``ratio`` (the share to remove). ``seed`` is for the random criterion.
    """

    profile: Path | None = None
    keep: int | None = None
    ratio: float | None = None
    keep_experts: Path | None = None
    criterion: str = "reap"
    seed: int = 0


def prune(source: str, spec: PruneSpec, writing: Writing, progress: Progress = SILENT) -> dict[str, Any]:
    """Write ``source`` without the experts that ``spec`` does not keep."""
    subject = open_subject(source)
    anatomy = subject.anatomy
    refuse_output(writing.output, CONFIG_NAME, overwrite=writing.overwrite, sources=(subject.root,))
    kept, how = _choice(subject, spec)
    try:
        plan = plan_prune(anatomy, kept)
    except UsageError as error:
        if spec.keep_experts is None:
            raise
        raise InputError(f"{spec.keep_experts}: {error}") from error
    if plan.changes_nothing and not writing.allow_noop:
        raise NothingToDo(f"nothing to prune: all {anatomy.experts} experts of every layer would stay; keep fewer")
    if plan.record:
        plan = EditPlan(plan.outputs, plan.dropped, plan.config, [{**plan.record[0], **how}])
    after = plan.result(anatomy).experts
    report = {
        "kept": {str(layer): list(kept[layer]) for layer in sorted(kept)},
        "dropped": {
            str(layer): [expert for expert in range(anatomy.experts) if expert not in kept[layer]]
            for layer in sorted(kept)
        },
        "experts_before": anatomy.experts,
        "experts_after": after,
        "warnings": parallel_warnings(anatomy.experts, after),
        "stages": [],
        "healing": [],
        **how,
        **finish(plan, subject, writing, progress),
    }
    for warning in report["warnings"]:
        progress.note(f"note: {warning}")
    return report


def _choice(subject: Subject, spec: PruneSpec) -> tuple[Kept, dict[str, Any]]:
    """Return the experts that stay and, for the record, how they were chosen."""
    anatomy = subject.anatomy
    if spec.keep_experts is not None:
        if (spec.profile, spec.keep, spec.ratio) != (None, None, None):
            raise UsageError("--keep-experts already says what stays: leave out --profile, --keep and --ratio")
        return _read_kept(spec.keep_experts), {"criterion": "keep-experts"}
    if spec.profile is None:
        raise UsageError("say what the choice is based on: give --profile (see moesurgeon profile) or --keep-experts")
    # Here: a quarter of the time to start goes into numpy, which a choice that was made needs not.
    from moesurgeon.profiling.artefact import load_profile
    from moesurgeon.selection.choose import best, count_to_keep
    from moesurgeon.selection.criteria import scores_of

    count = count_to_keep(anatomy.experts, keep=spec.keep, ratio=spec.ratio)
    check_count(anatomy, count)
    profile = load_profile(spec.profile)
    _check_profile(profile, subject, spec.profile)
    scores = scores_of(profile.weighted, spec.criterion, spec.seed)
    kept = best(scores, profile.statistics.layers, count, anatomy.groups[0])
    how: dict[str, Any] = {"criterion": spec.criterion, "profile_traces": profile.origin.trace_hashes}
    if profile.origin.weights:
        how["domain_weights"] = profile.origin.weights
    return kept, how | ({"seed": spec.seed} if spec.criterion == "random" else {})


def _check_profile(profile: Profile, subject: Subject, path: Path) -> None:
    statistics, anatomy = profile.statistics, subject.anatomy
    if profile.origin.fingerprint == subject.fingerprint:
        return
    if (statistics.layers, statistics.experts) != (anatomy.moe_layers, anatomy.experts):
        raise ProfileError(
            f"{path} counts {statistics.experts} experts in layers {list(statistics.layers)}, {subject.name} has "
            f"{anatomy.experts} in {list(anatomy.moe_layers)}; profile {subject.name} itself"
        )
    raise ProfileError(f"{path} was taken from another checkpoint than {subject.name}; profile {subject.name} itself")


def _read_kept(path: Path) -> Kept:
    """Read ``{"LAYER": [expert, ...]}`` with the source's numbering."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
        layers = [int(layer) for layer, _experts in pairs]
        kept = {int(layer): tuple(experts) for layer, experts in pairs}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JSON file {_KEPT}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not of the form {_KEPT}: {str(error)[:200]}; correct it") from error
    if not kept or not all(experts and all(type(item) is int for item in experts) for experts in kept.values()):
        raise InputError(f"{path} must map each layer to a list of expert numbers that is not empty: {_KEPT}")
    if len(layers) != len(kept):
        raise InputError(f"{path} names a layer twice; list each once")
    for layer, experts in kept.items():
        if len(set(experts)) != len(experts):
            raise InputError(f"{path}: layer {layer} lists an expert twice; list each that stays once")
    return kept
