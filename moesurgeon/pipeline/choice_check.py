"""What of a choice of experts cannot be, found before the work that it would come after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moesurgeon.errors import ProfileError, UsageError
from moesurgeon.pipeline.profile_match import check_profile
from moesurgeon.pipeline.prune_spec import PruneSpec, refuse_without_healing
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.subsets import inner_of
from moesurgeon.profiling.artefact import Profile, load_profile
from moesurgeon.report.curves import check_drawable
from moesurgeon.selection.criteria import SEARCHED, check_criterion, default_criterion, scores_of
from moesurgeon.selection.protect import check_protected, claims_of
from moesurgeon.surgery.anatomy import Anatomy


def check_choice(spec: PruneSpec) -> None:
    """Raise UsageError for what no profile can be asked; reads nothing."""
    refuse_without_healing(spec.criterion, spec.heal)
    if spec.criterion is not None:
        check_criterion(spec.criterion, spec.seed)
    if spec.virtual and spec.criterion in SEARCHED:
        raise UsageError(f"--virtual divides the cut by scores, and {spec.criterion} has none; name another criterion")
    if spec.is_staged and spec.wants_curve:
        raise UsageError("--curve is for a cut in one step: leave it out with --stages, --gate and --search")
    if spec.curve_plot is not None:
        check_drawable(spec.curve_plot)


def check_choice_on(spec: PruneSpec, domains: Sequence[str], length: int) -> None:
    """Raise UsageError for protection that a profile of ``domains``, in windows of ``length``, will not know."""
    check_protected(spec.protect, domains, length)


def check_choice_by(spec: PruneSpec, profile: Profile, anatomy: Anatomy) -> None:
    """Raise UsageError or ProfileError for what ``profile`` does not say."""
    if spec.protect:
        claims_of(profile, spec.protect)
    if spec.criterion == "reconstruction" or spec.wants_curve:
        inner_of(profile)
    if spec.criterion not in SEARCHED:
        default, _reason = default_criterion(anatomy.top_k, below=spec.below is not None)
        scores_of(profile.weighted, spec.criterion or default, spec.seed)


def profile_of(path: Path, subject: Subject | None, anatomy: Anatomy) -> Profile:
    """Return the profile in ``path``; ProfileError if it is not of ``subject`` (None: of what has ``anatomy``)."""
    profile = load_profile(path)
    if subject is not None:
        check_profile(profile, subject, path)
    statistics = profile.statistics
    if (statistics.layers, statistics.experts) != (anatomy.moe_layers, anatomy.experts):
        raise ProfileError(
            f"{path} counts {statistics.experts} experts in layers {list(statistics.layers)}, the checkpoint has "
            f"{anatomy.experts} in {list(anatomy.moe_layers)} by then; profile that"
        )
    return profile
