"""The error of a subset before any refit, from inner products of a sample: thousands of subsets in seconds.

On held-out tokens it ranks subsets much as the error after the refit does (``docs/how-it-works.md``), so that it says
which of them are worth a refit.

Legend: N sampled tokens, S subsets, E experts, m experts that were run for a token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.routing import Routing, selection_bias
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.errors import UsageError
from moesurgeon.healing.sample import Sample
from moesurgeon.profiling.all_experts import LIKELIEST, inner_products, likeliest_experts
from moesurgeon.profiling.inner import InnerLayer
from moesurgeon.profiling.statistics import Array
from moesurgeon.profiling.subset_errors import errors_of_subsets

TOKENS = 4096
"""Of the sample so many are enough for a bound."""


@torch.no_grad()
def inner_of(
    block: MoeBlock, routing: Routing, top_k: int, sample: Sample, tokens: int = TOKENS, at_once: int = BATCH_TOKENS
) -> InnerLayer:
    """Return inner products on up to ``tokens`` evenly taken tokens of ``sample``, in memory.

    ``at_once``: see ``profiling.all_experts.AllExperts``.
    """
    count = min(tokens, len(sample))
    at = torch.linspace(0, len(sample) - 1, count).long().to(sample.inputs.device)
    inputs, wanted, logits = sample.inputs[at], sample.wanted[at], sample.logits[at]
    bias, experts = selection_bias(block), logits.shape[1]
    chosen = routing.choose(routing.scores(logits), bias, top_k)
    likeliest = likeliest_experts(routing, logits, chosen, bias, min(LIKELIEST, experts))
    kept = likeliest.shape[1]
    found = InnerLayer(
        np.empty((count, kept, kept), np.float32),
        np.empty((count, kept), np.float32),
        np.empty(count, np.float32),
        logits.cpu().numpy(),
        likeliest.cpu().numpy().astype(np.int16) if kept < experts else None,
        None if bias is None else bias.float().cpu().numpy(),
    )
    for place, (gram, with_output, output) in inner_products(block, inputs, wanted, likeliest, at_once):
        w = sample.weights[at[place], None].double()  # scaled so, an error is that token's with its weight
        found.gram[place] = (gram * w[:, None]).float().cpu().numpy()
        found.with_output[place] = (with_output * w).float().cpu().numpy()
        found.output[place] = (output * w).squeeze(-1).float().cpu().numpy()
    return found


def bare_errors(inner: InnerLayer, routing: Routing, top_k: int) -> Callable[[NDArray[np.bool_]], Array]:
    """Return who tells the error [S] of subsets ``kept`` [S, E]: NaN for one that cannot give each token ``top_k``."""

    def errors(kept: NDArray[np.bool_]) -> Array:
        try:
            return errors_of_subsets(inner, routing, kept, top_k).error
        except UsageError:
            if len(kept) == 1:
                return np.array([np.nan])
            return np.concatenate([errors(row[None]) for row in kept])

    return errors
