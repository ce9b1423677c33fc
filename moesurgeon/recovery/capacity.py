"""Capacity in training: an expert takes so many choices of a batch, and what comes after them is dropped.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math

import torch


def places_of(choices: int, experts: int, factor: float) -> int:
    """Return how many choices each of ``experts`` takes: ``factor`` times an even share, rounded up.

    Switch Transformers (arXiv:2101.03961, eq. 3).

    >>> places_of(100, 8, 1.25)
    16
    """
    return math.ceil(factor * choices / experts)


def within_capacity(chosen_TK: torch.Tensor, is_text_T: torch.Tensor, experts: int, factor: float) -> torch.Tensor:
    """Return which of the choices [T, K] find a place, as GShard fills them (arXiv:2006.16668, alg. 1).

    First choices go before second ones, earlier tokens before later ones; padding takes no place.
    """
    tokens, top_k = chosen_TK.shape
    places = places_of(int(is_text_T.sum()) * top_k, experts, factor)
    in_order = chosen_TK.t().flatten()
    taken = torch.nn.functional.one_hot(in_order, experts) * is_text_T.repeat(top_k)[:, None]
    before = (taken.cumsum(0) - taken).gather(1, in_order[:, None])
    return (before < places).view(top_k, tokens).t()
