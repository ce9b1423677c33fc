"""What healing a layer takes by the formula of ``heal_cost.py``: FLOPs by kind, and seconds by what a machine does.

The kinds: ``forward`` (float32 products of passes), ``sums`` (float64 products, float32 ones on an accelerator),
``solve`` (factorisations and triangular solutions), ``train`` (forward and backward), ``adam`` (parameters, not FLOPs).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from moesurgeon.healing.pace import Method, Pace

Rates = Mapping[str, float]
"""By kind what is done in a second."""

WAYS: dict[str, tuple[Method, bool]] = {
    "ridge": ("ridge", False),
    "low": ("ridge", True),
    "distill": ("distill", False),
}
"""What is measured: the method, and whether with a rank."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What FLOPs follow from, of one layer after the cut: ``parts`` (width, share of the tokens) of its maps."""

    hidden: int
    parts: tuple[tuple[int, float], ...]
    other: int
    """FLOPs of a token in the rest of the layer."""

    @property
    def block(self) -> float:
        """FLOPs of a token in the block."""
        return sum(share * 6 * self.hidden * wide for wide, share in self.parts)

    @property
    def parameters(self) -> int:
        return sum(3 * self.hidden * wide for wide, _share in self.parts)


def pieces(size: Size, way: str, tokens: int, heldout: int, pace: Pace) -> dict[str, float]:
    """Return what healing one layer takes by kind.

    The walk: teacher once, student twice, and its block for what is missing, and on held-out tokens for the errors
    before and after and those of the dropped experts' tokens. A refit, for each of two sweeps: activations for the
    sums of both texts and for the update (with a rank also for the passes of the range finder), their products, and
    for each of five lambdas a factorisation, a solution and an error. A distillation: its steps, and held-out errors.
    """
    from moesurgeon.healing.normal import PASSES
    from moesurgeon.healing.ridge import LAMBDAS, SWEEPS

    high, both, tries = size.hidden, tokens + heldout, SWEEPS * len(LAMBDAS)
    made = {"forward": both * (3 * (size.other + size.block) + size.block) + 4 * heldout * size.block}
    made |= dict.fromkeys(("sums", "solve", "train", "adam"), 0.0)
    for wide, share in size.parts:
        rank = pace.rank if way == "low" and pace.rank is not None and pace.rank < wide else wide
        again = (PASSES * share * tokens) if rank < wide else 0.0
        made["forward"] += SWEEPS * 4 * high * wide * (2 * share * both + again)
        per_token = 2 * rank * rank + 2 * high * rank + 2 * high * wide + (2 * wide * rank if rank < wide else 0)
        made["sums"] += SWEEPS * (share * both * per_token + again * 4 * wide * rank) + tries * 2 * rank * rank * high
        made["solve"] += tries * solve_flops(rank, high) + (SWEEPS * PASSES * 4 * wide * rank**2 if rank < wide else 0)
    if way == "distill":
        made["train"] += 3 * size.block * pace.tokens_per_step * pace.steps
        made["forward"] += size.block * heldout * (pace.steps // pace.judge_every + 2)
        made["adam"] += size.parameters * pace.steps
    return made


def solve_flops(rank: int, high: int) -> float:
    """Return FLOPs of a Cholesky factorisation [r, r] and two triangular solutions for [r, H] (``rank``, ``high``).

    >>> solve_flops(3, 1)
    27.0
    """
    return float(rank**3 / 3 + 2 * rank * rank * high)


def seconds_of(made: Mapping[str, float], rates: Rates) -> float:
    """Return the seconds of ``made``, each kind at its rate.

    >>> seconds_of({"forward": 6.0, "adam": 2.0}, {"forward": 3.0, "adam": 4.0})
    2.5
    """
    return sum(amount / rates[kind] for kind, amount in made.items())


def ratios_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return by way predicted over measured seconds at the largest sizes of ``rows``, and their median.

    Of each of ``names`` that varies the row in which it is largest; if none does, the last row.

    >>> of = {way: 1.0 for way in WAYS}
    >>> rows = [{"experts": 4, "predicted": of, "measured": {way: each for way in WAYS}} for each in (5.0, 2.0)]
    >>> ratios_of(rows, ["experts"])["ridge"]
    {'experts 4': 0.5, 'median': 0.5}
    """
    varied = [name for name in names if len({row[name] for row in rows}) > 1]
    largest = {f"{name} {row[name]}": row for name in varied for row in [max(rows, key=itemgetter(name))]}
    largest = largest or {f"{names[0]} {rows[-1][names[0]]}": rows[-1]}
    found = {}
    for way in WAYS:
        each = {title: row["predicted"][way] / row["measured"][way] for title, row in largest.items()}
        found[way] = {**each, "median": statistics.median(each.values())}
    return found
