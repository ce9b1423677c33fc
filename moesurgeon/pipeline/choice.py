"""Which experts of a checkpoint stay, what that rests on, and how sure it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgeon.errors import InputError, NothingToDo, ProfileError, UsageError
from moesurgeon.pipeline.options import HealSpec
from moesurgeon.pipeline.subject import Subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.prune import Kept, check_count

if TYPE_CHECKING:
    from moesurgeon.profiling.artefact import Profile
    from moesurgeon.profiling.statistics import Statistics
    from moesurgeon.selection.stability import Stability

_KEPT = '{"LAYER": [expert, ...]}'


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """How many experts stay and by what they are chosen.

    Either ``keep_experts`` (a file with the choice) or ``profile`` with ``keep`` (a count per layer), ``ratio`` (the
    share to remove) or ``below`` (as many as have under this share of the tokens in every layer). ``criterion`` None:
    reap, with ``below`` frequency. ``seed`` is for the random criterion. ``heal``: repair the layers on text before
    writing. ``curve``: also say what any count costs each layer, and draw it to ``curve_plot`` if that is given.
    """

    profile: Path | None = None
    keep: int | None = None
    ratio: float | None = None
    below: float | None = None
    keep_experts: Path | None = None
    criterion: str | None = None
    seed: int = 0
    heal: HealSpec | None = None
    curve: bool = False
    curve_plot: Path | None = None

    @property
    def wants_curve(self) -> bool:
        return self.curve or self.curve_plot is not None


@dataclass(frozen=True)
class Choice:
    """``record``: how it was made, for the result's history; ``evidence`` for it, ``warnings`` against it."""

    kept: Kept
    record: dict[str, Any]
    evidence: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def choose(subject: Subject, spec: PruneSpec, progress: Progress = SILENT, *, dry_run: bool = False) -> Choice:
    """Return the experts of ``subject`` that stay; in a ``dry_run`` of ``below`` that may be all.

    In a dry run of ``spec`` with nothing but a curve, all stay.
    """
    if spec.keep_experts is not None:
        if spec.wants_curve:
            raise UsageError("--curve follows from a profile: give --profile, without --keep-experts")
        if (spec.profile, spec.keep, spec.ratio, spec.below) != (None, None, None, None):
            raise UsageError("--keep-experts already says what stays: leave out --profile, --keep, --ratio and --below")
        return Choice(_read_kept(spec.keep_experts), {"criterion": "keep-experts"})
    if spec.profile is None:
        raise UsageError("say what the choice is based on: give --profile (see moesurgeon profile) or --keep-experts")
    # Here: a quarter of the time to start goes into numpy, which a choice that was made needs not.
    from moesurgeon.profiling.artefact import load_profile
    from moesurgeon.selection.choose import count_to_keep

    if spec.curve_plot is not None:
        from moesurgeon.report.curves import check_drawable

        check_drawable(spec.curve_plot)
    asked = (spec.keep, spec.ratio, spec.below, spec.criterion, spec.heal)
    only_curve = spec.wants_curve and dry_run and all(each is None for each in asked)
    count = None
    if not only_curve:
        count = count_to_keep(subject.anatomy.experts, keep=spec.keep, ratio=spec.ratio, below=spec.below)
    if count is not None:
        check_count(subject.anatomy, count)
    profile = load_profile(spec.profile)
    _check_profile(profile, subject, spec.profile)
    if only_curve:
        everyone = dict.fromkeys(subject.anatomy.moe_layers, tuple(range(subject.anatomy.experts)))
        evidence, warnings = _curve(subject.anatomy, spec, profile, progress, {})
        return Choice(everyone, {"criterion": None}, evidence, warnings)
    return choose_by(subject.anatomy, spec, profile, progress, dry_run=dry_run)


def choose_by(
    anatomy: Anatomy, spec: PruneSpec, profile: Profile, progress: Progress = SILENT, *, dry_run: bool = False
) -> Choice:
    """Return the experts of ``anatomy`` that stay by ``spec`` and ``profile``, which must be of it."""
    from moesurgeon.selection.candidates import candidates, keep_above
    from moesurgeon.selection.choose import best, count_to_keep
    from moesurgeon.selection.criteria import scores_of
    from moesurgeon.selection.stability import stability

    fixed: Mapping[int, frozenset[int]] = {}
    groups = anatomy.groups[0]
    count = count_to_keep(anatomy.experts, keep=spec.keep, ratio=spec.ratio, below=spec.below)
    statistics = profile.weighted
    evidence: dict[str, Any] = {}
    if count is None:
        assert spec.below is not None
        try:
            count = keep_above(statistics, spec.below, _least(anatomy), groups)
        except NothingToDo:
            if not dry_run:
                raise
            count = anatomy.experts
        evidence["candidates"] = candidates(statistics, spec.below, groups)
    check_count(anatomy, count)
    criterion = spec.criterion or ("reap" if spec.below is None else "frequency")
    warnings: list[str] = []
    found: Stability | None = None
    if criterion == "reconstruction":
        from moesurgeon.pipeline.subsets import reconstruct

        searched = reconstruct(anatomy, profile, count, fixed, progress)
        kept, found = searched.kept, searched.stability
        evidence |= searched.evidence
        warnings += searched.warnings
    else:
        kept = best(scores_of(statistics, criterion, spec.seed), statistics.layers, count, groups)
        found = stability(statistics, criterion, count, groups)
    record: dict[str, Any] = {"criterion": criterion, "profile_traces": profile.origin.trace_hashes}
    if profile.origin.weights:
        record["domain_weights"] = profile.origin.weights
    if spec.below is not None:
        record["below"] = spec.below
    if criterion == "random":
        record["seed"] = spec.seed
    if count < anatomy.experts and criterion != "random":
        warnings += _weigh(statistics, found, kept, evidence)
    if spec.wants_curve:
        curve, against = _curve(anatomy, spec, profile, progress, fixed)
        evidence |= curve
        warnings += [warning for warning in against if warning not in warnings]
    return Choice(kept, record, evidence, warnings)


def _curve(
    anatomy: Anatomy, spec: PruneSpec, profile: Profile, progress: Progress, fixed: Mapping[int, frozenset[int]]
) -> tuple[dict[str, Any], list[str]]:
    """Return the curves of error against count as evidence, and what speaks against them; draw them if asked to."""
    from moesurgeon.pipeline.subsets import curves

    found, warnings = curves(anatomy, profile, _least(anatomy), fixed, progress)
    evidence: dict[str, Any] = {"curve": found}
    if spec.curve_plot is not None:
        from moesurgeon.report.curves import draw
        from moesurgeon.selection.curves import BEARABLE

        draw(found, anatomy.family.title, spec.curve_plot, BEARABLE)
        evidence["curve_plot"] = str(spec.curve_plot)
    return evidence, warnings


def _weigh(statistics: Statistics, found: Stability | None, kept: Kept, evidence: dict[str, Any]) -> list[str]:
    """Add to ``evidence`` how sure the choice is, ``found`` being how stable, and return what speaks against it."""
    from moesurgeon.profiling.uncertainty import SUPPORT, has_support

    evidence["stability"] = None if found is None else found.as_dict()
    warnings = []
    if found is None:
        warnings.append(
            "the profile has too few documents to tell whether other text would make the same choice; profile more text"
        )
    elif not found.is_settled:
        needed = "more of it" if found.tokens is None else f"about {found.tokens:,} tokens"
        warnings.append(
            f"the profile is too short for this choice: half of its documents would change {found.changed:.0%} of what "
            f"goes (layer {found.worst_layer}: {found.worst:.0%}); {needed} would settle it"
        )
    supported = has_support(statistics)
    unsure = {
        str(layer): experts
        for row, layer in enumerate(statistics.layers)
        if (experts := [e for e in range(statistics.experts) if e not in kept[layer] and not supported[row, e]])
    }
    evidence["low_support"] = unsure
    if unsure:
        places = [f"layer {layer}: {', '.join(map(str, experts[:8]))}" for layer, experts in unsure.items()]
        warnings.append(
            f"{sum(map(len, unsure.values()))} of the experts that go were given under {SUPPORT} tokens "
            f"({'; '.join(places[:6])}{'; ...' if len(places) > 6 else ''}): hardly seen is not cold, profile more text"
        )
    return warnings


def _least(anatomy: Anatomy) -> int:
    """Return the least number of experts per layer that can run."""

    def runs(count: int) -> bool:
        try:
            check_count(anatomy, count)
        except UsageError:
            return False
        return True

    return next(count for count in range(1, anatomy.experts + 1) if runs(count))


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
