"""From scores to the experts that stay: the same count in every layer and routing group."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from moesurgeon.errors import UsageError
from moesurgeon.profiling.statistics import Array


def count_to_keep(experts: int, *, keep: int | None, ratio: float | None, below: float | None = None) -> int | None:
    """Return how many experts stay per layer, from a count or from the share to remove.

    ``ratio`` rounds down what is removed, and refuses to round it to nothing. None: ``below``, a share of the tokens,
    is given instead, and the profile has to say.
    """
    check_budget(keep=keep, ratio=ratio, below=below)
    if keep is not None or ratio is None:
        return keep
    removed = int(experts * ratio + 1e-9)
    if removed == 0:
        raise UsageError(f"--ratio {ratio:g} of {experts} experts is less than one: nothing would be removed")
    return experts - removed


def check_budget(*, keep: int | None, ratio: float | None, below: float | None = None) -> None:
    """Raise UsageError unless one of the three says how many experts stay, in numbers that can be."""
    if (keep, ratio, below).count(None) != 2:
        raise UsageError("say how many experts stay: give --keep N, --ratio R or --below S (one of them)")
    if below is not None and not 0 < below < 1:
        raise UsageError(f"--below {below:g} is not between 0 and 1: it is a share of the tokens, such as 0.005")
    if ratio is not None and not 0 < ratio < 1:
        raise UsageError(f"--ratio {ratio:g} is not between 0 and 1: it is the share of experts to remove")


def best(
    scores: Array,
    layers: tuple[int, ...],
    count: int,
    groups: int = 1,
    *,
    fixed: Mapping[int, Collection[int]] | None = None,
) -> dict[int, tuple[int, ...]]:
    """Return, per layer, the ``count`` experts with the highest scores, ascending.

    With routing groups the best ``count / groups`` of each. ``fixed`` ones stay whatever they score; they must fit.
    Ties go to the lower number, so the same scores [L, E] always give the same choice.
    """
    size = scores.shape[1] // groups
    each = count // groups
    kept = {}
    for row, layer in enumerate(layers):
        held = set((fixed or {}).get(layer, ()))
        chosen: list[int] = []
        for group in range(groups):
            order = group * size + np.argsort(-scores[row, group * size : (group + 1) * size], kind="stable")
            first = sorted(order.tolist(), key=lambda expert: expert not in held)  # stable: the rest in their order
            assert sum(expert in held for expert in first) <= each, "more experts are fixed than can stay"
            chosen += first[:each]
        kept[layer] = tuple(sorted(chosen))
    return kept
