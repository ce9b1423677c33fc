"""Which experts of a checkpoint stay, what that rests on, and how sure it is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgeon.errors import InputError, NothingToDo, ProfileError, UsageError
from moesurgeon.pipeline.options import HealSpec
from moesurgeon.pipeline.subject import Subject
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.prune import Kept, check_count

if TYPE_CHECKING:
    from moesurgeon.profiling.artefact import Profile
    from moesurgeon.profiling.statistics import Statistics

HEALED = "healed"
_KEPT = '{"LAYER": [expert, ...]}'


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """How many experts stay and by what they are chosen.

    Either ``keep_experts`` (a file with the choice) or ``profile`` with ``keep`` (a count per layer), ``ratio`` (the
    share to remove) or ``below`` (as many as have under this share of the tokens in every layer). ``criterion`` None:
    reap, with ``below`` frequency. ``seed`` is for the random criterion. ``heal``: repair the layers on text before
    writing; the criterion healed chooses on it as well.
    """

    profile: Path | None = None
    keep: int | None = None
    ratio: float | None = None
    below: float | None = None
    keep_experts: Path | None = None
    criterion: str | None = None
    seed: int = 0
    heal: HealSpec | None = None


@dataclass(frozen=True)
class Unsettled:
    """What the criterion ``healed`` starts from: how many experts stay, and what the profile counted."""

    count: int
    statistics: Statistics


@dataclass(frozen=True)
class Choice:
    """``record``: how it was made, for the result's history; ``evidence`` for it, ``warnings`` against it.

    ``unsettled``: the count is right, but which experts stay is for the running model to say (``healed_choice``).
    """

    kept: Kept
    record: dict[str, Any]
    evidence: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unsettled: Unsettled | None = None


def choose(subject: Subject, spec: PruneSpec, *, dry_run: bool = False) -> Choice:
    """Return the experts of ``subject`` that stay; in a ``dry_run`` of ``below`` that may be all."""
    refuse_without_healing(spec.criterion, spec.heal)
    if spec.keep_experts is not None:
        if (spec.profile, spec.keep, spec.ratio, spec.below) != (None, None, None, None):
            raise UsageError("--keep-experts already says what stays: leave out --profile, --keep, --ratio and --below")
        return Choice(_read_kept(spec.keep_experts), {"criterion": "keep-experts"})
    if spec.profile is None:
        raise UsageError("say what the choice is based on: give --profile (see moesurgeon profile) or --keep-experts")
    # Here: a quarter of the time to start goes into numpy, which a choice that was made needs not.
    from moesurgeon.profiling.artefact import load_profile
    from moesurgeon.selection.choose import count_to_keep

    count = count_to_keep(subject.anatomy.experts, keep=spec.keep, ratio=spec.ratio, below=spec.below)
    if count is not None:
        check_count(subject.anatomy, count)
    profile = load_profile(spec.profile)
    _check_profile(profile, subject, spec.profile)
    return choose_by(subject.anatomy, spec, profile, dry_run=dry_run)


def refuse_without_healing(criterion: str | None, heal: HealSpec | None) -> None:
    """Raise UsageError for the criterion ``healed`` where nothing is healed."""
    if criterion == HEALED and heal is None:
        raise UsageError(
            "--criterion healed keeps the experts with which healing leaves least, so it needs text: add --heal TRACES"
        )
    if criterion == HEALED and heal is not None and heal.method == "none":
        raise UsageError(
            "--criterion healed is for a cut that is healed, and --heal-method none heals nothing; choose by reap, or "
            "another method"
        )


def choose_by(anatomy: Anatomy, spec: PruneSpec, profile: Profile, *, dry_run: bool = False) -> Choice:
    """Return the experts of ``anatomy`` that stay by ``spec`` and ``profile``, which must be of it."""
    from moesurgeon.selection.candidates import candidates, keep_above
    from moesurgeon.selection.choose import best, count_to_keep
    from moesurgeon.selection.criteria import scores_of

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
    by = ("frequency" if statistics.counts_only else "reap") if criterion == HEALED else criterion
    kept = best(scores_of(statistics, by, spec.seed), statistics.layers, count, groups)
    record: dict[str, Any] = {"criterion": criterion, "profile_traces": profile.origin.trace_hashes}
    if profile.origin.weights:
        record["domain_weights"] = profile.origin.weights
    if spec.below is not None:
        record["below"] = spec.below
    if criterion == "random":
        record["seed"] = spec.seed
    if criterion == HEALED and count < anatomy.experts:
        return Choice(kept, record, evidence, unsettled=Unsettled(count, statistics))
    warnings: list[str] = []
    if count < anatomy.experts and criterion != "random":
        warnings = _weigh(statistics, criterion, kept, groups, evidence)
    return Choice(kept, record, evidence, warnings)


def _weigh(statistics: Statistics, criterion: str, kept: Kept, groups: int, evidence: dict[str, Any]) -> list[str]:
    """Add to ``evidence`` how sure the choice is, and return what speaks against it."""
    from moesurgeon.selection.stability import stability

    found = stability(statistics, criterion, len(next(iter(kept.values()))), groups)
    evidence["stability"] = None if found is None else found.as_dict()
    warnings = []
    if found is None:
        warnings.append(
            "the profile has too few documents to tell whether other text would make the same choice; profile more text"
        )
    elif not found.is_settled:
        needed = (
            "no amount of text that could be estimated" if found.tokens is None else f"about {found.tokens:,} tokens"
        )
        warnings.append(
            f"the profile is too short for this choice: half of its documents would change {found.changed:.0%} of what "
            f"goes (layer {found.worst_layer}: {found.worst:.0%}); {needed} would settle it"
        )
    return warnings + weigh_support(statistics, kept, evidence)


def weigh_support(statistics: Statistics, kept: Kept, evidence: dict[str, Any]) -> list[str]:
    """Add to ``evidence`` which experts go though the profile hardly saw them, and return what is to be said of it."""
    from moesurgeon.profiling.uncertainty import SUPPORT, has_support

    supported = has_support(statistics)
    unsure = {
        str(layer): experts
        for row, layer in enumerate(statistics.layers)
        if (experts := [e for e in range(statistics.experts) if e not in kept[layer] and not supported[row, e]])
    }
    evidence["low_support"] = unsure
    if not unsure:
        return []
    places = [f"layer {layer}: {', '.join(map(str, experts[:8]))}" for layer, experts in unsure.items()]
    return [
        f"{sum(map(len, unsure.values()))} of the experts that go were given under {SUPPORT} tokens "
        f"({'; '.join(places[:6])}{'; ...' if len(places) > 6 else ''}): hardly seen is not cold, profile more text"
    ]


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
