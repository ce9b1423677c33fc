"""What fewer experts per token cost a layer, exactly and without running it: its error for every k.

With the k best of all experts, token t's choice and weights w follow from its logits by the family's own rule at that
k, and with f_j the experts' outputs, y what the block gave, and y_k = sum_j w_j f_j,

    <y_k, y> = sum_j w_j <f_j, y>,    |y_k|^2 = sum_ij w_i w_j <f_i, f_j>

are known from inner products (``profiling.inner``). So is the one factor a that takes y_k as close to y as a factor
can, a = sum_t <y_k, y> / sum_t |y_k|^2, and what it leaves. Shared experts cancel, so these are errors of the block.

Legend: N tokens, E experts, m experts that were run for a token, k experts that a token is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesurgeon.engine.routing import Routing
from moesurgeon.profiling.inner import InnerLayer
from moesurgeon.profiling.removals import rounded
from moesurgeon.profiling.subset_errors import routing_at

Array = NDArray[np.float64]
_AT_ONCE = 64 << 20  # bytes of inner products


@dataclass(frozen=True)
class TopKErrors:
    """Of a layer, for k from 1 on [K]: ``errors``, sums over tokens of |y - y_k|^2 as a share of that of |y|^2;
    ``scaled``, the same of y - a y_k; ``scales``, the factors a."""

    errors: Array
    scaled: Array
    scales: Array

    def as_dict(self) -> dict[str, Any]:
        """Return ``errors``, ``scaled`` and ``scale``, each by k."""
        named = {"errors": self.errors, "scaled": self.scaled, "scale": self.scales}
        return {
            name: {str(k): float(value) for k, value in enumerate(values, start=1)} for name, values in named.items()
        }


def errors_by_top_k(
    layer: InnerLayer, rule: Mapping[str, Any], top_k: int, weights: Array | None = None, *, at_once: int = _AT_ONCE
) -> TopKErrors:
    """Return what every k from 1 to ``top_k`` costs ``layer``, over tokens that count ``weights`` [N] (None: one each).

    ``rule``: the profile's, which may leave the weight of a single choice as it is (:func:`routing_at`). A token that
    would be given an expert which was not run counts as if it were given nothing: its error is |y|^2. ``at_once``:
    bytes of memory at about.
    """
    weights = np.ones(len(layer.output)) if weights is None else weights
    routings = [routing_at(rule, k) for k in range(1, top_k + 1)]
    rows = np.flatnonzero(weights)
    step = max(1, at_once // (4 * layer.gram.shape[-1] ** 2))
    sums = np.zeros((2, top_k))  # of <y_k, y> and of |y_k|^2
    for start in range(0, len(rows), step):
        sums += _sums(layer, routings, rows[start : start + step], weights)
    cross, both = sums
    size = float(weights[rows] @ layer.output[rows].astype(np.float64))
    scales = np.divide(cross, both, out=np.ones(top_k), where=both > 0)
    errors, scaled = size - 2 * cross + both, size - 2 * scales * cross + scales**2 * both
    # A layer that gives nothing cannot be got wrong by a share.
    return TopKErrors(rounded(errors / (size or 1.0)), rounded(scaled / (size or 1.0)), scales)


def _sums(layer: InnerLayer, routings: list[Routing], rows: NDArray[np.int64], weights: Array) -> Array:
    """Return for each k [K] the weighted sums over the tokens ``rows`` of <y_k, y> and |y_k|^2 [2, K]."""

    def read(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[rows]))

    gram_Nmm, with_output_Nm = read(layer.gram), read(layer.with_output)
    logits_NE, weights_N = read(layer.logits), read(weights)
    bias_E = None if layer.bias is None else torch.from_numpy(np.array(layer.bias))
    place_NE: torch.Tensor | None = None  # of an expert among those that were run; -1: it was not
    if layer.experts is not None:
        experts_Nm = read(layer.experts).long()
        place_NE = torch.full(logits_NE.shape, -1)
        place_NE.scatter_(1, experts_Nm, torch.arange(experts_Nm.shape[1]).expand_as(experts_Nm))
    token_N1 = torch.arange(len(rows))[:, None]
    sums = []
    for k, routing in enumerate(routings, start=1):
        scores_NE = routing.scores(logits_NE)
        place_Nk = routing.choose(scores_NE, bias_E, k)
        share_Nk = routing.weights(scores_NE, place_Nk).double()
        if place_NE is not None:
            place_Nk = place_NE.gather(-1, place_Nk)
            share_Nk = share_Nk * (place_Nk >= 0).all(-1, keepdim=True)
            place_Nk = place_Nk.clamp(min=0)
        cross_N = (share_Nk * with_output_Nm.gather(-1, place_Nk).double()).sum(-1)
        products_Nkk = gram_Nmm[token_N1[..., None], place_Nk[:, :, None], place_Nk[:, None, :]].double()
        both_N = (products_Nkk * share_Nk[:, :, None] * share_Nk[:, None, :]).sum((-2, -1))
        sums.append([float(weights_N @ cross_N), float(weights_N @ both_N)])
    return np.array(sums).T
