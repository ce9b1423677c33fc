"""Which experts of a checkpoint stay, what that rests on, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgeon.errors import InputError, NothingToDo, UsageError
from moesurgeon.pipeline.explained import explain_choice
from moesurgeon.pipeline.keep_file import read_kept
from moesurgeon.pipeline.profile_match import check_profile
from moesurgeon.pipeline.prune_spec import HEALED, PruneSpec, refuse_without_healing
from moesurgeon.pipeline.spreading import spread_choice
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.weighing import weigh, weigh_traffic
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import Kept, check_count, plan_prune
from moesurgeon.surgery.virtual import plan_virtual, refuse_without_bias

if TYPE_CHECKING:
    from moesurgeon.profiling.artefact import Profile
    from moesurgeon.profiling.statistics import Statistics
    from moesurgeon.selection.protect import Claims
    from moesurgeon.selection.stability import Stability


@dataclass(frozen=True)
class Unsettled:
    """What the criterion ``healed`` starts from: how many experts stay, ``fixed`` ones among them, and the profile."""

    count: int
    profile: Profile
    fixed: Mapping[int, Collection[int]]
    claims: Claims | None


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
    return replace(plan, record=[{**plan.record[0], **how}])


def choose(subject: Subject, spec: PruneSpec, progress: Progress = SILENT, *, dry_run: bool = False) -> Choice:
    """Return the experts of ``subject`` that stay; in a ``dry_run`` of ``below`` that may be all.

    In a dry run of ``spec`` with nothing but a curve, all stay.
    """
    refuse_without_healing(spec.criterion, spec.heal)
    if spec.virtual:
        refuse_without_bias(subject.anatomy)
    if spec.keep_experts is not None:
        return _by_file(subject, spec, spec.keep_experts)
    if spec.profile is None:
        raise UsageError("say what the choice is based on: give --profile (see moesurgeon profile) or --keep-experts")
    # Here: a quarter of the time to start goes into numpy, which a choice that was made needs not.
    from moesurgeon.profiling.artefact import load_profile
    from moesurgeon.selection.choose import check_budget, count_to_keep

    if spec.curve_plot is not None:
        from moesurgeon.report.curves import check_drawable

        check_drawable(spec.curve_plot)
    asked = (spec.keep, spec.ratio, spec.below, spec.criterion, spec.heal)
    only_curve = spec.wants_curve and dry_run and all(each is None for each in asked)
    if spec.virtual and not only_curve:
        check_budget(keep=spec.keep, ratio=spec.ratio, below=spec.below)
    elif not only_curve:
        count = count_to_keep(subject.anatomy.experts, keep=spec.keep, ratio=spec.ratio, below=spec.below)
        if count is not None:
            check_count(subject.anatomy, count)
    profile = load_profile(spec.profile)
    check_profile(profile, subject, spec.profile)
    if only_curve:
        everyone = dict.fromkeys(subject.anatomy.moe_layers, tuple(range(subject.anatomy.experts)))
        evidence, warnings = _curve(subject.anatomy, spec, profile, progress, {})
        return Choice(everyone, {"criterion": None}, evidence, warnings)
    choice = choose_by(subject.anatomy, spec, profile, progress, dry_run=dry_run)
    if choice.unsettled is not None:
        return choice
    criterion = choice.record["criterion"]
    why = explain_choice(subject.anatomy, profile, choice.kept, criterion, spec.seed, virtual=spec.virtual)
    return replace(choice, evidence={**choice.evidence, **why})


def choose_by(
    anatomy: Anatomy, spec: PruneSpec, profile: Profile, progress: Progress = SILENT, *, dry_run: bool = False
) -> Choice:
    """Return the experts of ``anatomy`` that stay by ``spec`` and ``profile``, which must be of it."""
    from moesurgeon.selection.candidates import candidates
    from moesurgeon.selection.criteria import default_criterion, scores_of
    from moesurgeon.selection.protect import claims_of
    from moesurgeon.selection.stability import stability

    statistics = profile.weighted
    default, reason = default_criterion(anatomy.top_k, below=spec.below is not None)
    criterion = spec.criterion or default
    claims = claims_of(profile, spec.protect) if spec.protect else None
    count, fixed, choose = _limits(anatomy, spec, statistics, criterion, claims, dry_run=dry_run)
    evidence: dict[str, Any] = {} if spec.criterion else {"criterion_reason": reason}
    warnings: list[str] = []
    if spec.below is not None:
        spared = None if claims is None else claims.protected
        evidence["candidates"] = candidates(statistics, spec.below, anatomy.groups[0], spared)
    found: Stability | None
    if criterion == HEALED and count is not None:
        # Any experts will do until then.
        by = "frequency" if statistics.counts_only else "reap"
        kept = choose(scores_of(statistics, by), fixed=fixed)
        if spec.wants_curve:
            evidence |= _curve(anatomy, spec, profile, progress, fixed)[0]
        unsettled = Unsettled(count, profile, fixed, claims) if count < anatomy.experts else None
        return Choice(kept, _record(spec, profile, criterion), evidence, unsettled=unsettled)
    if criterion == "reconstruction":
        from moesurgeon.pipeline.subsets import reconstruct

        assert count is not None, "virtual cuts are spread by scores"
        searched = reconstruct(anatomy, profile, count, fixed, progress)
        kept, found = searched.kept, searched.stability
        evidence |= searched.evidence
        warnings += searched.warnings
        free = kept if claims is None else reconstruct(anatomy, profile, count, {}, progress).kept
    else:
        scores = scores_of(statistics, criterion, spec.seed)
        kept, free = choose(scores, fixed=fixed), choose(scores, fixed={})
        found = stability(statistics, criterion, partial(choose, fixed=fixed), fixed)
    record = _record(spec, profile, criterion)
    if claims is not None:
        evidence["protection"] = claims.report(kept, free)
        record["protect"] = evidence["protection"]["names"]
        warnings += claims.warnings_of(kept)
    if any(len(stay) < anatomy.experts for stay in kept.values()) and criterion != "random":
        warnings += weigh(statistics, found, kept, evidence)
    warnings += weigh_traffic(statistics, kept, evidence, criterion)
    if spec.wants_curve:
        curve, against = _curve(anatomy, spec, profile, progress, fixed)
        evidence |= curve
        warnings += [warning for warning in against if warning not in warnings]
    return Choice(kept, record, evidence, warnings)


def _limits(
    anatomy: Anatomy, spec: PruneSpec, statistics: Statistics, criterion: str, claims: Claims | None, *, dry_run: bool
) -> tuple[int | None, Mapping[int, Collection[int]], Callable[..., Kept]]:
    """Return how many stay in each layer (None: not as many everywhere), who has to, and who chooses by scores."""
    from moesurgeon.selection.candidates import keep_above
    from moesurgeon.selection.choose import best, count_to_keep

    if spec.virtual:
        return None, *spread_choice(anatomy, spec, statistics, criterion, claims, dry_run=dry_run)
    groups = anatomy.groups[0]
    count = count_to_keep(anatomy.experts, keep=spec.keep, ratio=spec.ratio, below=spec.below)
    if count is None:
        assert spec.below is not None
        try:
            spared = None if claims is None else claims.protected
            count = keep_above(statistics, spec.below, _least(anatomy), groups, spared)
        except NothingToDo:
            if not dry_run:
                raise
            count = anatomy.experts
    check_count(anatomy, count)
    fixed = {} if claims is None else claims.fixed(count // groups, groups)
    return count, fixed, partial(best, layers=statistics.layers, count=count, groups=groups)


def _record(spec: PruneSpec, profile: Profile, criterion: str) -> dict[str, Any]:
    """Return what the result's history says of the choice."""
    record: dict[str, Any] = {"criterion": criterion, "profile_traces": profile.origin.trace_hashes}
    if profile.origin.weights:
        record["domain_weights"] = profile.origin.weights
    if spec.below is not None:
        record["below"] = spec.below
    if criterion == "random":
        record["seed"] = spec.seed
    return record


def choice_of_file(spec: PruneSpec, path: Path) -> Choice:
    """Return the choice in ``path``; UsageError where ``spec`` says more of it, InputError for what is no choice."""
    if spec.wants_curve:
        raise UsageError("--curve follows from a profile: give --profile, without --keep-experts")
    if (spec.keep, spec.ratio, spec.below, spec.criterion, spec.protect) != (None, None, None, None, ()):
        raise UsageError(
            "--keep-experts already says what stays: leave out --keep, --ratio, --below, --criterion and --protect "
            "(--profile may stay: it says what traffic goes)"
        )
    return Choice(read_kept(path), {"criterion": "keep-experts"})


def _by_file(subject: Subject, spec: PruneSpec, path: Path) -> Choice:
    """Return the choice in a file; with a profile also what that says of it."""
    choice = choice_of_file(spec, path)
    if spec.profile is None:
        return choice
    from moesurgeon.profiling.artefact import load_profile

    profile = load_profile(spec.profile)
    check_profile(profile, subject, spec.profile)
    plan_chosen(subject.anatomy, choice, spec)  # refuses what cannot be: layers or experts that there are not
    evidence: dict[str, Any] = {}
    warnings = weigh_traffic(profile.weighted, choice.kept, evidence)
    evidence |= explain_choice(subject.anatomy, profile, choice.kept, "keep-experts", virtual=spec.virtual)
    return replace(choice, evidence=evidence, warnings=warnings)


def _curve(
    anatomy: Anatomy, spec: PruneSpec, profile: Profile, progress: Progress, fixed: Mapping[int, Collection[int]]
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


def _least(anatomy: Anatomy) -> int:
    """Return the least number of experts per layer that can run."""

    def runs(count: int) -> bool:
        try:
            check_count(anatomy, count)
        except UsageError:
            return False
        return True

    return next(count for count in range(1, anatomy.experts + 1) if runs(count))
