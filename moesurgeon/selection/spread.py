"""One budget over all layers: each loses as many experts as it can spare, by scores that are comparable.

Only virtual pruning can do that: stock runtimes hold one number of experts for the whole model.

Legend: L mixture layers, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from moesurgeon.errors import UsageError
from moesurgeon.profiling.statistics import Array


def total_to_drop(experts: int, layers: int, *, keep: int | None, ratio: float | None, least: int) -> int:
    """Return how many of ``layers`` x ``experts`` go: ``keep`` is an average per layer, ``ratio`` the share that goes.

    ``ratio`` rounds down. Raises UsageError if nothing would go by it, or more than leaves every layer ``least``.
    """
    if keep is not None:
        if keep > experts:
            raise UsageError(f"cannot keep {keep} experts: the checkpoint has {experts}")
        if keep < least:
            raise UsageError(f"keep at least {least} experts per layer on average, so that every token finds its own")
        return (experts - keep) * layers
    assert ratio is not None
    total = int(ratio * experts * layers + 1e-9)
    if total == 0:
        raise UsageError(f"--ratio {ratio:g} of {experts * layers} experts is less than one: nothing would go")
    if total > (experts - least) * layers:
        raise UsageError(
            f"--ratio {ratio:g} leaves layers under {least} experts, which each has to keep; at most "
            f"{(experts - least) / experts:.3g} can go"
        )
    return total


def spread(
    scores: Array,
    layers: tuple[int, ...],
    total: int,
    least: int,
    groups: int = 1,
    *,
    fixed: Mapping[int, Collection[int]] | None = None,
) -> dict[int, tuple[int, ...]]:
    """Return, per layer, who stays when ``total`` experts go: those that score lowest among all layers.

    A layer's scores [L, E] count by their mean, so that a layer of large outputs is not spared for them. Every
    routing group keeps ``least``, and all ``fixed`` ones stay. Ties go to the lower layer and number.
    """
    relative = relative_scores(scores)
    held = {(row, expert) for row, layer in enumerate(layers) for expert in (fixed or {}).get(layer, ())}
    size = scores.shape[1] // groups
    left = np.full((len(layers), groups), size)
    stays = np.ones(scores.shape, dtype=bool)
    # From the lowest; of equal ones the last goes first.
    order = scores.size - 1 - np.argsort(relative.ravel()[::-1], kind="stable")
    for place in order:
        row, expert = divmod(int(place), scores.shape[1])
        if total == 0:
            break
        if left[row, expert // size] > least and (row, expert) not in held:
            stays[row, expert] = False
            left[row, expert // size] -= 1
            total -= 1
    assert total == 0, "more are to go than can"
    return {layer: tuple(np.flatnonzero(stays[row]).tolist()) for row, layer in enumerate(layers)}


def relative_scores(scores: Array) -> Array:
    """Return scores [L, E] over their layer's mean; 1 where a layer has none, which says nothing of its experts.

    >>> relative_scores(np.array([[1.0, 3.0], [0.0, 0.0]])).tolist()
    [[0.5, 1.5], [1.0, 1.0]]
    """
    means = scores.mean(axis=1, keepdims=True)
    result: Array = np.divide(scores, means, out=np.ones_like(scores), where=means > 0)
    return result
