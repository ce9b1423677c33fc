"""Scores of experts as functions of a profile: the higher, the more worth keeping.

Legend: L mixture layers, E experts. For expert e of a layer, over the tokens t routed to it with
weight w and output f:

- ``frequency``      number of tokens
- ``gate``           sum of w
- ``ean``            sum of |f|                      (expert activation norm)
- ``man``            mean of |f|
- ``reap``           mean of w |f|                   (REAP, arXiv:2510.13999)
- ``traffic-reap``   sum of w |f|
- ``random``         seeded noise: the control that a criterion has to beat

What a choice costs as a whole no sum of scores can say: ``SEARCHED`` criteria judge subsets (``selection.search``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moesurgeon.errors import ProfileError, UsageError
from moesurgeon.profiling.statistics import Array, Statistics


def _mean(name: str) -> Callable[[Statistics, int], Array]:
    def score(statistics: Statistics, seed: int) -> Array:
        sums, counts = statistics.total(name), statistics.total("tokens")
        # An expert that was never routed has no mean; it scores lowest.
        result: Array = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        return result

    return score


def _sum(name: str) -> Callable[[Statistics, int], Array]:
    return lambda statistics, seed: statistics.total(name)


def _random(statistics: Statistics, seed: int) -> Array:
    return np.random.default_rng(seed).random((len(statistics.layers), statistics.experts))


CRITERIA: dict[str, Callable[[Statistics, int], Array]] = {
    "frequency": _sum("tokens"),
    "gate": _sum("weight"),
    "ean": _sum("norm"),
    "man": _mean("norm"),
    "reap": _mean("weighted_norm"),
    "traffic-reap": _sum("weighted_norm"),
    "random": _random,
}
SUMS = ("frequency", "gate", "ean", "traffic-reap")
"""Criteria to which an expert's traffic counts."""
COUNTING = ("frequency", "random")
"""Criteria that need no more than how many tokens each expert was given."""
SEARCHED = {"reconstruction": "profile --inner", "healed": "--heal"}
"""Criteria of whole subsets, and what each rests on."""


def default_criterion(top_k: int, *, below: bool = False) -> tuple[str, str]:
    """Return the criterion that is taken where none is named, and why; ``below``: experts under a share of the tokens.

    With one expert per token the weight says little (where the gate renormalises it is 1), and a mean per token drops
    experts that most tokens go to: docs/choosing.md has the measurements.

    >>> default_criterion(2)[0], default_criterion(1)[0], default_criterion(2, below=True)[0]
    ('reap', 'traffic-reap', 'frequency')
    """
    if below:
        return "frequency", "the default with --below, which is about shares of the tokens"
    if top_k == 1:
        return "traffic-reap", "the default at top-1, where a mean per token drops experts that most tokens go to"
    return "reap", f"the default at top-{top_k}"


def check_criterion(criterion: str, seed: int = 0) -> None:
    """Raise UsageError for a name that is no criterion and for a seed that is none."""
    if criterion not in CRITERIA and criterion not in SEARCHED:
        searched = ", ".join(f"{name} (needs {what})" for name, what in SEARCHED.items())
        raise UsageError(f"--criterion {criterion} is not one of {', '.join(CRITERIA)}, {searched}")
    if seed < 0:
        raise UsageError(f"--seed {seed} is negative; choose a number from 0 on")


def scores_of(statistics: Statistics, criterion: str, seed: int = 0) -> Array:
    """Return the scores [L, E] of ``criterion``."""
    check_criterion(criterion, seed)
    if statistics.counts_only and criterion not in COUNTING:
        raise ProfileError(
            f"the profile holds a server's token counts only, which say nothing of {criterion}: choose by "
            f"--criterion frequency, or profile the checkpoint with moesurgeon profile"
        )
    return CRITERIA[criterion](statistics, seed)
