"""Which experts of a checkpoint stay, what that rests on, and how sure it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgeon.errors import InputError, NothingToDo, ProfileError, UsageError
from moesurgeon.pipeline.explained import explain_choice
from moesurgeon.pipeline.options import HealSpec
from moesurgeon.pipeline.spreading import spread_choice
from moesurgeon.pipeline.subject import Subject
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import Kept, check_count, plan_prune
from moesurgeon.surgery.virtual import plan_virtual, refuse_without_bias

if TYPE_CHECKING:
    from moesurgeon.profiling.artefact import Profile
    from moesurgeon.profiling.statistics import Array, Statistics

_KEPT = '{"LAYER": [expert, ...]}'


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """How many experts stay and by what they are chosen.

    Either ``keep_experts`` (a file with the choice) or ``profile`` with ``keep`` (a count per layer), ``ratio`` (the
    share to remove) or ``below`` (as many as have under this share of the tokens in every layer). ``criterion`` None:
    reap, with ``below`` frequency. ``seed`` is for the random criterion. ``protect``: texts whose experts stay, each
    NAME[=share] (``selection.protect``). ``virtual``: experts are put out of reach by their bias instead of removed,
    so that layers may lose different numbers. ``heal``: repair the layers on text before writing.

    ``stages``: cut in several steps, each with a new profile, as ``selection.counts`` reads it (or a list of counts).
    ``gates``: what the result of each step has to fulfil on validation text, or it is rolled back. ``search``: find the
    smallest count that does. ``run``: the folder that stages are kept in (None: beside the output, until it is
    written).
    """

    profile: Path | None = None
    keep: int | None = None
    ratio: float | None = None
    below: float | None = None
    keep_experts: Path | None = None
    criterion: str | None = None
    seed: int = 0
    protect: tuple[str, ...] = ()
    virtual: bool = False
    heal: HealSpec | None = None
    stages: str | tuple[int, ...] | None = None
    gates: tuple[str, ...] = ()
    search: bool = False
    run: Path | None = None

    @property
    def is_staged(self) -> bool:
        """Whether the cut is judged, in one step or several."""
        return self.stages is not None or bool(self.gates) or self.search


@dataclass(frozen=True)
class Choice:
    """``record``: how it was made, for the result's history; ``evidence`` for it, ``warnings`` against it."""

    kept: Kept
    record: dict[str, Any]
    evidence: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def plan_chosen(anatomy: Anatomy, choice: Choice, spec: PruneSpec) -> EditPlan:
    """Plan to keep what was chosen; InputError where a file made a choice that cannot be."""
    try:
        plan = (plan_virtual if spec.virtual else plan_prune)(anatomy, choice.kept)
        return with_how(plan, choice.record)
    except UsageError as error:
        if spec.keep_experts is None:
            raise
        raise InputError(f"{spec.keep_experts}: {error}") from error


def with_how(plan: EditPlan, how: Mapping[str, Any]) -> EditPlan:
    """Return a plan to prune whose record says ``how`` the experts were chosen."""
    if not plan.record:
        return plan
    return EditPlan(plan.outputs, plan.dropped, plan.config, [{**plan.record[0], **how}])


def choose(subject: Subject, spec: PruneSpec, *, dry_run: bool = False) -> Choice:
    """Return the experts of ``subject`` that stay; in a ``dry_run`` of ``below`` that may be all."""
    if spec.virtual:
        refuse_without_bias(subject.anatomy)
    if spec.keep_experts is not None:
        if (spec.profile, spec.keep, spec.ratio, spec.below, spec.protect) != (None, None, None, None, ()):
            raise UsageError(
                "--keep-experts already says what stays: leave out --profile, --keep, --ratio, --below and --protect"
            )
        return Choice(_read_kept(spec.keep_experts), {"criterion": "keep-experts"})
    if spec.profile is None:
        raise UsageError("say what the choice is based on: give --profile (see moesurgeon profile) or --keep-experts")
    # Here: a quarter of the time to start goes into numpy, which a choice that was made needs not.
    from moesurgeon.profiling.artefact import load_profile
    from moesurgeon.selection.choose import check_budget, count_to_keep

    if spec.virtual:
        check_budget(keep=spec.keep, ratio=spec.ratio, below=spec.below)
    else:
        count = count_to_keep(subject.anatomy.experts, keep=spec.keep, ratio=spec.ratio, below=spec.below)
        if count is not None:
            check_count(subject.anatomy, count)
    profile = load_profile(spec.profile)
    _check_profile(profile, subject, spec.profile)
    choice = choose_by(subject.anatomy, spec, profile, dry_run=dry_run)
    criterion = choice.record["criterion"]
    why = explain_choice(subject.anatomy, profile, choice.kept, criterion, spec.seed, virtual=spec.virtual)
    return replace(choice, evidence={**choice.evidence, **why})


def choose_by(anatomy: Anatomy, spec: PruneSpec, profile: Profile, *, dry_run: bool = False) -> Choice:
    """Return the experts of ``anatomy`` that stay by ``spec`` and ``profile``, which must be of it."""
    from moesurgeon.selection.candidates import candidates, keep_above
    from moesurgeon.selection.choose import best, count_to_keep
    from moesurgeon.selection.criteria import scores_of
    from moesurgeon.selection.protect import claims_of

    groups = anatomy.groups[0]
    statistics = profile.weighted
    criterion = spec.criterion or ("reap" if spec.below is None else "frequency")
    claims = claims_of(profile, spec.protect) if spec.protect else None
    spared = None if claims is None else claims.protected
    evidence: dict[str, Any] = {}
    fixed: Mapping[int, Collection[int]] = {}
    choose: Callable[..., Kept]
    if spec.virtual:
        fixed, choose = spread_choice(anatomy, spec, statistics, criterion, claims, dry_run=dry_run)
    else:
        count = count_to_keep(anatomy.experts, keep=spec.keep, ratio=spec.ratio, below=spec.below)
        if count is None:
            assert spec.below is not None
            try:
                count = keep_above(statistics, spec.below, _least(anatomy), groups, spared)
            except NothingToDo:
                if not dry_run:
                    raise
                count = anatomy.experts
        check_count(anatomy, count)
        fixed = fixed if claims is None else claims.fixed(count // groups, groups)
        choose = partial(best, layers=statistics.layers, count=count, groups=groups)
    if spec.below is not None:
        evidence["candidates"] = candidates(statistics, spec.below, groups, spared)
    scores = scores_of(statistics, criterion, spec.seed)
    kept = choose(scores, fixed=fixed)
    record: dict[str, Any] = {"criterion": criterion, "profile_traces": profile.origin.trace_hashes}
    if profile.origin.weights:
        record["domain_weights"] = profile.origin.weights
    if spec.below is not None:
        record["below"] = spec.below
    if criterion == "random":
        record["seed"] = spec.seed
    warnings: list[str] = []
    if claims is not None:
        evidence["protection"] = claims.report(kept, choose(scores, fixed={}))
        record["protect"] = evidence["protection"]["names"]
        warnings += claims.warnings_of(kept)
    if any(len(stay) < anatomy.experts for stay in kept.values()) and criterion != "random":
        warnings += _weigh(statistics, criterion, kept, partial(choose, fixed=fixed), fixed, evidence)
    return Choice(kept, record, evidence, warnings)


def _weigh(
    statistics: Statistics,
    criterion: str,
    kept: Kept,
    choose: Callable[[Array], Kept],
    fixed: Mapping[int, Collection[int]],
    evidence: dict[str, Any],
) -> list[str]:
    """Add to ``evidence`` how sure the choice is, and return what speaks against it."""
    from moesurgeon.profiling.uncertainty import SUPPORT, has_support
    from moesurgeon.selection.stability import stability

    found = stability(statistics, criterion, choose, fixed)
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
