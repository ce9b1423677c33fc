"""What the stages of a cut have come to, and how many experts each of them is to leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moesurgeon.errors import UsageError
from moesurgeon.pipeline.choice import with_how
from moesurgeon.pipeline.options import HealSpec
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.selection.choose import count_to_keep
from moesurgeon.selection.counts import possible_counts, stage_counts
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan, compose, identity
from moesurgeon.surgery.prune import check_count, plan_prune

Numbers = Mapping[int, tuple[int, ...]]
"""By layer, experts in the source's numbering."""


@dataclass(frozen=True)
class State:
    """What stages have come to: the ``plan`` for the source, the ``anatomy`` of its result, and which experts of
    the source are left in it."""

    plan: EditPlan
    anatomy: Anatomy
    left: Numbers

    @classmethod
    def of_source(cls, anatomy: Anatomy) -> State:
        everyone = tuple(range(anatomy.experts))
        return cls(identity(anatomy), anatomy, dict.fromkeys(anatomy.routed_layers, everyone))

    def cut(self, kept: Numbers, how: Mapping[str, Any]) -> State:
        """Return the state with only the experts ``kept`` of this one (in its own numbering)."""
        plan = plan_prune(self.anatomy, kept)
        return State(
            compose(self.plan, with_how(plan, how)),
            plan.result(self.anatomy),
            {layer: tuple(self.left[layer][expert] for expert in experts) for layer, experts in kept.items()},
        )

    def with_healed(self, healed: EditPlan | None) -> State:
        """Return the state with what healed it, a plan for its anatomy."""
        return self if healed is None else replace(self, plan=compose(self.plan, healed))


def heal_of(spec: PruneSpec) -> HealSpec:
    """Return what heals and judges the stages; UsageError where nothing does."""
    if spec.heal is None:
        asked = "--search" if spec.search else "--stages" if spec.stages else "--gate"
        raise UsageError(
            f"{asked} judges on text: name it with --heal (with --heal-method none nothing is healed, only judged)"
        )
    return spec.heal


def of_count(spec: PruneSpec, count: int) -> PruneSpec:
    """Return how one cut to ``count`` experts is chosen."""
    return replace(spec, keep=count, ratio=None, below=None, curve=False, curve_plot=None)


def counts_of(anatomy: Anatomy, spec: PruneSpec) -> tuple[int, ...]:
    """Return the counts of the stages, or for a search those that may be tried; falling.

    Where a file says what stays (``spec.keep_experts``) that is asked of it, not here.
    """
    if spec.virtual:
        raise UsageError("--virtual does not go with --stages, --gate or --search; heal it with --heal, or evaluate it")
    if spec.below is not None:
        raise UsageError("--below does not go with --stages, --gate or --search; give --keep or --ratio")
    given = [name for name, value in (("--keep", spec.keep), ("--ratio", spec.ratio)) if value is not None]
    if spec.search:
        if not spec.gates:
            raise UsageError("--search looks for the smallest count that passes a gate: add --gate")
        if spec.stages is not None or spec.keep_experts is not None:
            raise UsageError("--search chooses the count itself: leave out --stages and --keep-experts")
        least = 1
        if given:
            found = count_to_keep(anatomy.experts, keep=spec.keep, ratio=spec.ratio)
            assert found is not None
            check_count(anatomy, found)
            least = found
        counts = tuple(
            n for n in possible_counts(anatomy.experts, anatomy.groups[0]) if n >= least and _runs(anatomy, n)
        )
        if not counts:
            raise UsageError("--search has no count to try: none below the checkpoint's own can run")
        return counts
    if spec.stages is not None:
        if given or spec.keep_experts is not None:
            raise UsageError(f"--stages says how many stay: leave out {given[0] if given else '--keep-experts'}")
        counts = stage_counts(spec.stages, anatomy.experts, anatomy.groups[0])
    else:
        found = count_to_keep(anatomy.experts, keep=spec.keep, ratio=spec.ratio)
        assert found is not None
        counts = (found,)
    for count in counts:
        check_count(anatomy, count)
    return counts


def _runs(anatomy: Anatomy, count: int) -> bool:
    try:
        check_count(anatomy, count)
    except UsageError:
        return False
    return True
