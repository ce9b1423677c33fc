"""What subsets of a layer's experts cost, many times as fast for all that are one expert short of the same subset.

A search asks what each expert of S would be missed. Tokens that are not routed to e do not notice that it goes, but
that of a softmax which is not renormalised all weights grow; those that are have the next in rank instead. So one
look at each token's k experts and the next answers for all of S at once. The error is that of ``subset_errors``:
with p_j the scores before any expert went, C the choice, and D what weights are divided by (the sum of p over C where
the gate renormalises, over S where it is a softmax that does not, else 1),

    |y - y_S|^2 = |y|^2 - 2 sum_C p_j / D <f_j, y> + sum_CC p_i p_j / D^2 <f_i, f_j>.

With routing groups the one that goes may also cost its group its place, which the best of those that lost then takes.

Legend: N tokens, E experts, m experts that were run for a token, k experts that it is given, G groups, g that win;
c choices of a token, each of u experts, of which r parts are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesurgeon.engine.routing import Routing
from moesurgeon.profiling.inner import InnerLayer

Array = NDArray[np.float64]
_AT_ONCE = 4096  # tokens
_DIGITS = 9  # of a share of |y|^2: inner products in float32 tell no more than 1e-7 apart, and ties are to be ties


class LayerErrors:
    """The errors of subsets of a layer's experts as a share of |y|^2, over tokens that count ``weights`` [N].

    A token that would be given an expert which was not run for it counts as lost: its error is |y|^2.
    The inner products of tokens that count are held in memory. ``weights`` None: one each.
    """

    def __init__(self, layer: InnerLayer, routing: Routing, top_k: int, weights: Array | None = None) -> None:
        weights = np.ones(len(layer.output)) if weights is None else weights
        rows = np.flatnonzero(weights)
        self._parts = [
            _Tokens(layer, routing, top_k, rows[start : start + _AT_ONCE], weights)
            for start in range(0, len(rows), _AT_ONCE)
        ]
        self._weight = float(weights.sum())
        # A layer that gives nothing cannot be got wrong by a share.
        self._size = sum(part.size for part in self._parts) or 1.0

    def __call__(self, kept: NDArray[np.bool_]) -> Array:
        """Return what keeping only ``kept`` [S, E] costs; each has to leave every token enough experts."""
        sums = [sum(part.error(mask_E) for part in self._parts) for mask_E in torch.from_numpy(kept)]
        return rounded(np.array(sums) / self._size)

    def without_each(self, kept: NDArray[np.bool_]) -> Array:
        """Return what ``kept`` [E] costs without each of its experts [E]; infinite where that cannot be routed."""
        if any(part.order_changes for part in self._parts):
            result, going = np.full(len(kept), np.inf), np.flatnonzero(kept)
            result[going] = self(kept & (np.arange(len(kept)) != going[:, None]))
            return result
        sums = np.zeros(len(kept))
        for part in self._parts:
            sums += part.without_each(torch.from_numpy(kept)).numpy()
        return np.where(kept, rounded(sums / self._size), np.inf)

    def covered(self, kept: NDArray[np.bool_]) -> float:
        """Return the share of tokens for which all that they would be given of ``kept`` [E] was run."""
        return sum(part.covered(torch.from_numpy(kept)) for part in self._parts) / (self._weight or 1.0)


def rounded(errors: Array) -> Array:
    """Return shares of |y|^2 without what is only rounding."""
    return np.maximum(errors, 0.0).round(_DIGITS)


@dataclass(frozen=True)
class _Terms:
    """Of some experts of each token: the sums of p, of p <f, y>, of p p <f, f>, and whether one was not run."""

    scores: torch.Tensor
    cross: torch.Tensor
    both: torch.Tensor
    lost: torch.Tensor

    def __getitem__(self, place: Any) -> _Terms:
        return _Terms(self.scores[place], self.cross[place], self.both[place], self.lost[place])


class _Groups:
    """Routing groups of each token, by the first of their experts, of which one choice takes ``most`` and one more.

    n experts make up a group's score, s of each are looked at.
    """

    def __init__(self, ranked_NE: torch.Tensor, rule: Routing, most: int) -> None:
        size, count = ranked_NE.shape[1] // rule.groups, 1 if rule.group_score == "max" else 2
        values_NGs, at_NGs = ranked_NE.unflatten(-1, (rule.groups, size)).topk(min(max(most, count) + 1, size), dim=-1)
        self._values_NGs, self._experts_NGs = values_NGs, at_NGs + size * torch.arange(rule.groups)[:, None]
        scores_NG = values_NGs[..., :count].sum(-1).topk(rule.kept_groups + 1, dim=-1)
        self._winners_Ng, self._next_N1 = scores_NG.indices[:, :-1], scores_NG.indices[:, -1:]
        self._next_score_N1, self._count = scores_NG.values[:, -1:], count

    def first(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the first ``count`` experts [N, count] of the winning groups are ranked by, and who they are."""
        return self._first_of(torch.arange(len(self._winners_Ng)), self._winners_Ng, count)

    def fallen(self, top_k: int) -> tuple[torch.Tensor, ...]:
        """Return whose groups lose their place without one expert: R pairs of a token and a winner, as ``rows`` [R].

        With the experts that the winner's score rests on [R, n], whether it loses without each [R, n], and then the
        choice among the other winners and the next, as :meth:`first` does [R, k].
        """
        count, winners_Ng = self._count, self._winners_Ng
        place = winners_Ng[..., None].expand(-1, -1, self._values_NGs.shape[-1])
        best_Ngs = torch.nn.functional.pad(self._values_NGs.gather(1, place), (0, 1), value=-torch.inf)[
            ..., : count + 1
        ]
        # What the score is without each: of the next in its stead.
        without_Ngn = torch.stack(
            [best_Ngs[..., [at for at in range(count + 1) if at != gone]].sum(-1) for gone in range(count)], dim=-1
        )
        falls_Ngn = without_Ngn < self._next_score_N1[..., None]
        rows_R, winner_R = falls_Ngn.any(-1).nonzero(as_tuple=True)
        needed_Rn = self._experts_NGs[rows_R, winners_Ng[rows_R, winner_R], :count]
        groups_Rg = winners_Ng[rows_R].scatter(1, winner_R[:, None], self._next_N1[rows_R])
        return rows_R, needed_Rn, falls_Ngn[rows_R, winner_R], *self._first_of(rows_R, groups_Rg, top_k)

    def _first_of(self, rows_R: torch.Tensor, groups_Rg: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        place = (rows_R[:, None], groups_Rg)
        values_Rc, at_Rc = self._values_NGs[place].flatten(1).topk(count, dim=-1)
        return values_Rc, self._experts_NGs[place].flatten(1).gather(-1, at_Rc)


class _Tokens:
    """Some tokens of a layer, N of them."""

    def __init__(
        self, layer: InnerLayer, routing: Routing, top_k: int, rows: NDArray[np.int64], weights: Array
    ) -> None:
        def read(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array[rows]))

        self._routing, self._top_k = routing, top_k
        self._gram_Nmm, self._with_output_Nm = read(layer.gram), read(layer.with_output)
        self._output_N1, self._weights_N = read(layer.output).double()[:, None], read(weights)
        # In float64: what is far below the best is to be told apart once that is gone.
        logits_NE, self._softmax = read(layer.logits).double(), routing.scoring == "softmax"
        self._scores_NE = logits_NE.softmax(-1) if self._softmax else logits_NE.sigmoid()
        self._bias_E = None if layer.bias is None else torch.from_numpy(np.array(layer.bias)).double()
        self._place_NE: torch.Tensor | None = None  # of an expert among those that were run; -1: it was not
        if layer.experts is not None:
            experts_Nm = read(layer.experts).long()
            self._place_NE = torch.full(self._scores_NE.shape, -1)
            self._place_NE.scatter_(1, experts_Nm, torch.arange(experts_Nm.shape[1]).expand_as(experts_Nm))
        self._has_groups = routing.groups > routing.kept_groups
        # Scores of a softmax grow when an expert goes and the bias does not, so others may change places.
        self.order_changes = self._softmax and self._bias_E is not None
        self.size = float(self._weights_N @ self._output_N1[:, 0])

    def error(self, mask_E: torch.Tensor) -> float:
        """Return the error of ``mask_E``, summed over tokens."""
        chosen_Nk = self._chosen(mask_E)
        terms = self._terms(chosen_Nk[:, None], torch.ones(1, self._top_k))[:, :, 0]
        return float(self._weights_N @ self._error(terms, self._rest(mask_E))[:, 0])

    def covered(self, mask_E: torch.Tensor) -> float:
        """Return the weight of tokens for which all that they would be given was run."""
        if self._place_NE is None:
            return float(self._weights_N.sum())
        return float(self._weights_N @ (self._place_NE.gather(-1, self._chosen(mask_E)) >= 0).all(-1).double())

    def without_each(self, mask_E: torch.Tensor) -> torch.Tensor:
        """Return the error of ``mask_E`` without each expert [E], summed over tokens."""
        k, ranked_NE = self._top_k, self._ranked(mask_E)
        groups = _Groups(ranked_NE, self._routing, k) if self._has_groups else None
        values_Nu, first_Nu = ranked_NE.topk(k + 1, dim=-1) if groups is None else groups.first(k + 1)
        chosen_Nk = first_Nu[:, :k]
        # All of the first k + 1 but one, each in turn: but the last, that is the choice as it is.
        terms = self._terms(first_Nu[:, None], 1 - torch.eye(k + 1))[:, 0]
        rest_NE = self._rest_without(mask_E)
        error_NE = self._error(terms[:, k:], rest_NE).expand_as(rest_NE).clone()
        replaced_Nk = self._error(terms[:, :k], rest_NE.gather(-1, chosen_Nk))
        # There may be no other left in the winning groups.
        replaced_Nk.masked_fill_(values_Nu[:, k:] == -torch.inf, torch.inf)
        error_NE.scatter_(-1, chosen_Nk, replaced_Nk)
        if groups is not None:
            self._put_fallen(error_NE, groups, rest_NE)
        return self._weights_N @ error_NE

    def _put_fallen(self, error_NE: torch.Tensor, groups: _Groups, rest_NE: torch.Tensor) -> None:
        """Correct ``error_NE`` where a winning group loses its place without an expert that its score rests on."""
        rows_R, needed_Rn, falls_Rn, values_Rk, chosen_Rk = groups.fallen(self._top_k)
        terms = self._terms(chosen_Rk[:, None], torch.ones(1, self._top_k), rows_R)[:, 0]
        fallen_Rn = self._error(terms, rest_NE[rows_R[:, None], needed_Rn], rows_R).expand_as(needed_Rn).clone()
        fallen_Rn.masked_fill_(values_Rk[:, -1:] == -torch.inf, torch.inf)
        error_NE[rows_R[:, None].expand_as(needed_Rn)[falls_Rn], needed_Rn[falls_Rn]] = fallen_Rn[falls_Rn]

    def _rest(self, mask_E: torch.Tensor) -> torch.Tensor:
        """Return the sum of p over those that stay [N, 1]."""
        return (self._scores_NE @ mask_E.double())[:, None]

    def _rest_without(self, mask_E: torch.Tensor) -> torch.Tensor:
        """Return for each expert the sum of p over the others that stay [N, E].

        Of those before and those behind it: a difference would say nothing where one has nearly all of the softmax.
        """
        before_NE = (self._scores_NE * mask_E).cumsum(-1).roll(1, -1)
        behind_NE = (self._scores_NE * mask_E).flip(-1).cumsum(-1).roll(1, -1)
        before_NE[:, 0] = behind_NE[:, 0] = 0.0
        return before_NE + behind_NE.flip(-1)

    def _ranked(self, mask_E: torch.Tensor) -> torch.Tensor:
        """Return what the choice goes by [N, E]: -inf for those that are gone."""
        ranked_NE = self._scores_NE
        if self._bias_E is not None:
            ranked_NE = (ranked_NE / self._rest(mask_E) if self._softmax else ranked_NE) + self._bias_E
        return ranked_NE.masked_fill(~mask_E, -torch.inf)

    def _chosen(self, mask_E: torch.Tensor) -> torch.Tensor:
        return self._routing.ranked(self._ranked(mask_E), None).topk(self._top_k, dim=-1).indices

    def _terms(self, experts_Ncu: torch.Tensor, parts_ru: torch.Tensor, rows_N: torch.Tensor | None = None) -> _Terms:
        """Return terms [N, c, r] of the ``parts_ru``, ones and zeros, of choices of all tokens or of ``rows_N``."""
        token_N11 = (torch.arange(len(experts_Ncu)) if rows_N is None else rows_N)[:, None, None]
        scores_Ncu = self._scores_NE[token_N11, experts_Ncu]
        lost_Ncu, place_Ncu = torch.zeros(experts_Ncu.shape), experts_Ncu
        if self._place_NE is not None:
            place_Ncu = self._place_NE[token_N11, experts_Ncu]
            lost_Ncu, place_Ncu = (place_Ncu < 0).float(), place_Ncu.clamp(min=0)
        cross_Ncu = scores_Ncu * self._with_output_Nm[token_N11, place_Ncu]
        # One number for each pair: gathering from a flat array takes no copy of what is not asked for.
        row_Ncu = (token_N11 * self._gram_Nmm.shape[1] + place_Ncu) * self._gram_Nmm.shape[2]
        both_Ncuu = self._gram_Nmm.view(-1).take(row_Ncu[..., None] + place_Ncu[..., None, :]).double()
        both_Ncuu *= scores_Ncu[..., :, None] * scores_Ncu[..., None, :]
        parts_ur = parts_ru.T.double()
        return _Terms(
            scores_Ncu @ parts_ur,
            cross_Ncu @ parts_ur,
            ((both_Ncuu @ parts_ur) * parts_ur).sum(-2),
            lost_Ncu @ parts_ru.T > 0,
        )

    def _error(self, terms: _Terms, rest: torch.Tensor, rows: Any = slice(None)) -> torch.Tensor:
        """Return the error of choices [N, c] of the tokens ``rows``; ``rest``: the sum of p over all that stay then."""
        divisor: torch.Tensor | float = 1.0
        if self._routing.renormalises:
            divisor = terms.scores + self._routing.epsilon * (rest if self._softmax else 1.0)
        elif self._softmax:
            divisor = torch.maximum(rest, terms.scores)  # rounding may say less where hardly anything stays
        output, scale = self._output_N1[rows], self._routing.scale
        error = output - 2 * scale * terms.cross / divisor + scale**2 * terms.both / divisor**2
        return torch.where(terms.lost, output, error)
