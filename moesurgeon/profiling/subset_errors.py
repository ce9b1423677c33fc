"""What a subset of the experts costs a layer, exactly and without running it: linear algebra on inner products.

With the experts outside S gone and the top-k' of the others taken, token t is routed anew: its choice and its
weights w follow from its logits by the family's own rule, those outside S being -inf. With f_j the experts'
outputs and y what the block gave, the error of the routed output is

    |y - sum_j w_j f_j|^2 = |y|^2 - 2 sum_j w_j <f_j, y> + sum_ij w_i w_j <f_i, f_j>,

in which all products are known (``profiling.inner``). Shared experts cancel, so it is the error of the block.

Legend: S subsets, N tokens, E experts, m experts that were run for a token, k experts that a token is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesurgeon.engine.routing import Routing
from moesurgeon.errors import ProfileError, UsageError
from moesurgeon.profiling.inner import InnerLayer

Array = NDArray[np.float64]
_AT_ONCE = 64 << 20  # bytes


@dataclass(frozen=True)
class SubsetErrors:
    """Of each subset [S]: ``error``, the mean over tokens of |y - y_S|^2; ``relative``, that over the mean of |y|^2;
    ``covered``, the share of tokens that were counted: those for which all that they are routed to was run.
    ``error`` is NaN where there are none."""

    error: Array
    relative: Array
    covered: Array


def errors_of_subsets(
    layer: InnerLayer,
    routing: Routing,
    kept: NDArray[np.bool_],
    top_k: int,
    *,
    tokens: NDArray[np.bool_] | None = None,
    at_once: int = _AT_ONCE,
) -> SubsetErrors:
    """Return what keeping only the experts ``kept`` [S, E] with a top-``top_k`` gate costs ``layer``.

    ``routing``: the rule at that top-k (:func:`routing_at`). ``tokens`` [N]: count only these. ``at_once``: bytes
    of memory at about. Exact but for the rounding of float32: the least that can be told is about 1e-7 of |y|^2.
    Groups are those of the original; they are also those of the written checkpoint if every group loses as many.
    Raises UsageError for a subset that cannot give every token ``top_k`` experts.
    """
    _refuse_too_few(kept, routing, top_k)
    rows = np.arange(len(layer.output)) if tokens is None else np.flatnonzero(tokens)
    sums = torch.zeros(3, len(kept), dtype=torch.float64)  # of errors, of |y|^2, of tokens
    mask_SE = torch.from_numpy(np.where(kept, np.float32(0), np.float32(-np.inf)))
    # Of a token and a subset: some copies of E float32 with the indices of a sort, and k x k float64 thrice.
    pair = 40 * kept.shape[1] + 24 * top_k * top_k
    token_step = max(1, min(len(rows), at_once // (4 * layer.gram.shape[-1] ** 2), at_once // pair))
    for first in range(0, len(rows), token_step):
        block = _Block(layer, rows[first : first + token_step])
        subset_step = max(1, at_once // (pair * len(block.output_T)))
        for start in range(0, len(kept), subset_step):
            place = slice(start, start + subset_step)
            sums[:, place] += block.sums(routing, mask_SE[place], top_k)
    error, size, count = sums.numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        return SubsetErrors(
            np.where(count > 0, np.maximum(error, 0.0) / count, np.nan),
            np.where(count > 0, np.maximum(error, 0.0) / np.where(size > 0, size, np.nan), np.nan),
            count / max(1, len(rows)),
        )


def _refuse_too_few(kept: NDArray[np.bool_], routing: Routing, top_k: int) -> None:
    """Raise UsageError where a token could be left with fewer than ``top_k`` of the ``kept`` [S, E].

    In whichever groups win, that is; one without the experts that its score is taken of does not.
    """
    counts = np.sort(kept.reshape(len(kept), routing.groups, -1).sum(axis=-1), axis=1)  # [S, groups]
    counts[counts < (2 if routing.groups > 1 and routing.group_score != "max" else 1)] = 0
    # Of the groups that can win the smallest ones.
    first = (counts == 0).sum(axis=1)
    if (first > routing.groups - routing.kept_groups).any():
        raise UsageError(f"a subset leaves fewer than {routing.kept_groups} groups to choose from; keep more experts")
    given = [int(row[at : at + routing.kept_groups].sum()) for row, at in zip(counts, first, strict=True)]
    if (fewest := min(given, default=top_k)) < top_k:
        raise UsageError(f"a subset of {fewest} experts is less than each token is given; keep at least {top_k}")


def routing_at(rule: Mapping[str, Any], top_k: int) -> Routing:
    """Return the routing of a profile's ``rule`` at ``top_k``: some gates leave the weight of a single choice as it is.

    Raises ProfileError for a rule that is none.
    """
    try:
        return Routing(
            scoring=str(rule["scoring"]),
            renormalises=bool(rule["renormalises"][0 if top_k == 1 else 1]),
            scale=float(rule["scale"]),
            groups=int(rule["groups"]),
            kept_groups=int(rule["kept_groups"]),
            group_score=str(rule["group_score"]),
            epsilon=float(rule["epsilon"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ProfileError("the profile's routing rule is damaged; make it again with moesurgeon profile") from error


class _Block:
    """Some tokens of a layer, T of them, in memory."""

    def __init__(self, layer: InnerLayer, rows: NDArray[np.int64]) -> None:
        def read(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array[rows]))

        self.gram_Tmm = read(layer.gram)
        self.with_output_Tm = read(layer.with_output)
        self.output_T = read(layer.output).double()
        self.logits_TE = read(layer.logits)
        self.bias_E = None if layer.bias is None else torch.from_numpy(np.array(layer.bias))
        self.place_TE: torch.Tensor | None = None  # of an expert among those that were run; -1: it was not
        if layer.experts is not None:
            experts_Tm = read(layer.experts).long()
            self.place_TE = torch.full(self.logits_TE.shape, -1)
            self.place_TE.scatter_(1, experts_Tm, torch.arange(experts_Tm.shape[1]).expand_as(experts_Tm))

    def sums(self, routing: Routing, mask_SE: torch.Tensor, top_k: int) -> torch.Tensor:
        """Return for each subset, summed over the tokens that are covered: errors, |y|^2, tokens [3, S]."""
        scores_STE = routing.scores(self.logits_TE + mask_SE[:, None])
        bias_SE = mask_SE[:, None] if self.bias_E is None else (self.bias_E + mask_SE)[:, None]
        chosen_STk = routing.ranked(scores_STE, bias_SE).topk(top_k, dim=-1).indices
        weights_STk = routing.weights(scores_STE, chosen_STk).double()
        covered_ST = torch.ones(chosen_STk.shape[:2], dtype=torch.bool)
        if self.place_TE is not None:
            chosen_STk = self.place_TE.expand(len(mask_SE), -1, -1).gather(-1, chosen_STk)
            covered_ST = ((chosen_STk >= 0) | (weights_STk == 0)).all(-1)
            chosen_STk = chosen_STk.clamp(min=0)
        kept = self.gram_Tmm.shape[-1]
        pairs_STkk = (chosen_STk[..., :, None] * kept + chosen_STk[..., None, :]).flatten(-2)
        products = self.gram_Tmm.flatten(1).expand(len(mask_SE), -1, -1).gather(-1, pairs_STkk).double()
        both = (products * (weights_STk[..., :, None] * weights_STk[..., None, :]).flatten(-2)).sum(-1)
        cross = self.with_output_Tm.expand(len(mask_SE), -1, -1).gather(-1, chosen_STk).double()
        error_ST = self.output_T - 2 * (weights_STk * cross).sum(-1) + both
        covered = covered_ST.double()
        return torch.stack([(error_ST * covered).sum(-1), (self.output_T * covered).sum(-1), covered.sum(-1)])
