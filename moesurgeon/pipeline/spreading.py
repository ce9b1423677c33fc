"""Virtual pruning's budget: how many experts go in all, and the choice that divides them among the layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

from moesurgeon.errors import NothingToDo, UsageError
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.prune import Kept
from moesurgeon.surgery.virtual import least_of_group

if TYPE_CHECKING:
    from moesurgeon.profiling.statistics import Statistics
    from moesurgeon.selection.protect import Claims


class Budget(Protocol):
    """What was asked for: one of the three."""

    @property
    def keep(self) -> int | None: ...
    @property
    def ratio(self) -> float | None: ...
    @property
    def below(self) -> float | None: ...


def spread_choice(
    anatomy: Anatomy,
    budget: Budget,
    statistics: Statistics,
    criterion: str,
    claims: Claims | None,
    *,
    dry_run: bool,
) -> tuple[Mapping[int, Collection[int]], Callable[..., Kept]]:
    """Return who is sure to stay, and a function from scores [L, E] (and ``fixed``) to all who stay.

    ``below``: as many go as get under that share, wherever they are. Raises UsageError for a budget that cannot be
    kept and for a criterion without scores; NothingToDo where nothing is below, unless it is a ``dry_run``.
    """
    from moesurgeon.selection.candidates import cold_experts
    from moesurgeon.selection.choose import check_budget
    from moesurgeon.selection.criteria import CRITERIA
    from moesurgeon.selection.spread import spread, total_to_drop

    if criterion not in CRITERIA:
        raise UsageError(
            f"--virtual divides what goes among the layers by scores, and --criterion {criterion} gives none; "
            f"choose one of {', '.join(CRITERIA)}"
        )
    groups, layers = anatomy.groups[0], len(statistics.layers)
    least, size = least_of_group(anatomy), anatomy.experts // groups
    check_budget(keep=budget.keep, ratio=budget.ratio, below=budget.below)
    if budget.below is not None:
        cold = cold_experts(statistics, budget.below, None if claims is None else claims.protected)
        # Of a group that is cold as a whole as many stay as it takes to run.
        total = int(cold.reshape(layers, groups, size).sum(axis=2).clip(max=size - least).sum())
        if total == 0 and not dry_run:
            raise NothingToDo(f"nothing to prune: nobody gets under {budget.below:g} of the tokens; raise --below")
    else:
        total = total_to_drop(anatomy.experts, layers, keep=budget.keep, ratio=budget.ratio, least=least * groups)
    fixed = {} if claims is None else claims.fixed_in_all(total, least, groups)
    return fixed, partial(spread, layers=statistics.layers, total=total, least=least, groups=groups)
