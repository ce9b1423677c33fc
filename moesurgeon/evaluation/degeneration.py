"""Degeneration: how much a model repeats itself when it goes on greedily, which perplexity does not show.

A cut model whose perplexity rose by a few per cent can still end every answer in a loop (Holtzman et al.,
"The curious case of neural text degeneration"; distinct-n after Li et al.). Everything here is counted on
tokens of the continuations alone, without their prompts and without the token that ends a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

NGRAM = 4
"""Tokens of what counts as repeated: three happen to come again in good text, four hardly."""
LONGEST_PERIOD, ROUNDS = 16, 3
"""A loop is the same up to 16 tokens three times in a row."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """``tokens`` that a model made of a prompt; ``stopped``: it ended the text itself."""

    domain: str
    tokens: Sequence[int]
    stopped: bool


def repeated(tokens: Sequence[int], size: int = NGRAM) -> int:
    """Count the tokens that lie in a sequence of ``size`` tokens that comes more than once.

    >>> repeated([1, 2, 3, 4, 9, 1, 2, 3, 4])
    8
    >>> repeated([1, 2, 3, 9, 1, 2, 3])
    0
    """
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    times = Counter(grams)
    inside = {place for start, gram in enumerate(grams) if times[gram] > 1 for place in range(start, start + size)}
    return len(inside)


def distinct(tokens: Sequence[int], size: int) -> tuple[int, int]:
    """Return how many different sequences of ``size`` tokens there are, and how many altogether.

    >>> distinct([1, 2, 1, 2, 1], 2)
    (2, 4)
    """
    count = max(0, len(tokens) - size + 1)
    return len({tuple(tokens[start : start + size]) for start in range(count)}), count


def loop_at(tokens: Sequence[int]) -> int | None:
    """Return where the loop begins in which ``tokens`` end; None if they end in none.

    Of several periods that fit, the one whose loop begins first is taken.

    >>> loop_at([5, 6, 7, 1, 2, 1, 2, 1, 2])
    3
    >>> loop_at([5, 6, 7, 1, 2, 1, 2]) is None
    True
    """
    starts = []
    for period in range(1, LONGEST_PERIOD + 1):
        start = len(tokens) - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if len(tokens) - start >= ROUNDS * period:
            starts.append(start)
    return min(starts, default=None)


def degeneration(continuations: Sequence[Continuation], domains: Sequence[str], new_tokens: int) -> dict[str, Any]:
    """Return the report: figures of all ``continuations`` of up to ``new_tokens``, and by domain."""
    return {
        "prompts": len(continuations),
        "new_tokens": new_tokens,
        **_figures(continuations),
        "domains": {
            domain: {"prompts": len(mine), **_figures(mine)}
            for domain in domains
            for mine in [[each for each in continuations if each.domain == domain]]
        },
    }


def _figures(continuations: Sequence[Continuation]) -> dict[str, float | None]:
    """Shares of tokens and sequences are those of all continuations together; None where there are none."""
    all_tokens = [each.tokens for each in continuations]
    loops = [start for tokens in all_tokens if (start := loop_at(tokens)) is not None]
    return {
        "repetition_rate": _share(sum(map(repeated, all_tokens)), sum(map(len, all_tokens))),
        **{f"distinct_{size}": _distinct_share(all_tokens, size) for size in (1, 2, 4)},
        "loops": _share(len(loops), len(continuations)),
        "first_loop_at": float(median(loops)) if loops else None,
        "early_stop": _share(sum(each.stopped for each in continuations), len(continuations)),
    }


def _distinct_share(all_tokens: Sequence[Sequence[int]], size: int) -> float | None:
    counts = [distinct(tokens, size) for tokens in all_tokens]
    return _share(sum(different for different, _ in counts), sum(count for _, count in counts))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
