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
        return np.maximum(np.array(sums), 0.0) / self._size

    def without_each(self, kept: NDArray[np.bool_]) -> Array:
        """Return what ``kept`` [E] costs without each of its experts [E]; infinite where that cannot be routed."""
        if any(part.order_changes for part in self._parts):
            result, going = np.full(len(kept), np.inf), np.flatnonzero(kept)
            result[going] = self(kept & (np.arange(len(kept)) != going[:, None]))
            return result
        sums = np.zeros(len(kept))
        for part in self._parts:
            sums += part.without_each(torch.from_numpy(kept)).numpy()
        return np.where(kept, np.maximum(sums, 0.0) / self._size, np.inf)

    def covered(self, kept: NDArray[np.bool_]) -> float:
        """Return the share of tokens for which all that they would be given of ``kept`` [E] was run."""
        return sum(part.covered(torch.from_numpy(kept)) for part in self._parts) / (self._weight or 1.0)


@dataclass(frozen=True)
class _Terms:
    """Of some experts of each token: the sums of p, of p <f, y>, of p p <f, f>, and whether one was not run."""

    scores: torch.Tensor
    cross: torch.Tensor
    both: torch.Tensor
    lost: torch.Tensor

    def __getitem__(self, place: Any) -> _Terms:
        return _Terms(self.scores[place], self.cross[place], self.both[place], self.lost[place])


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
        inside_NE = self._inside(ranked_NE)
        first_Nu = inside_NE.topk(k + 1, dim=-1).indices
        chosen_Nk, next_N1 = first_Nu[:, :k], first_Nu[:, k:]
        # All of the first k + 1 but one, each in turn: but the last, that is the choice as it is.
        terms = self._terms(first_Nu[:, None], 1 - torch.eye(k + 1))[:, 0]
        rest_NE = self._rest(mask_E) - self._scores_NE
        error_NE = self._error(terms[:, k:], rest_NE).expand_as(rest_NE).clone()
        replaced_Nk = self._error(terms[:, :k], rest_NE.gather(-1, chosen_Nk))
        # There may be no other left in the winning groups.
        replaced_Nk.masked_fill_(inside_NE.gather(-1, next_N1) == -torch.inf, torch.inf)
        error_NE.scatter_(-1, chosen_Nk, replaced_Nk)
        if self._has_groups:
            self._put_fallen(error_NE, ranked_NE, rest_NE)
        return self._weights_N @ error_NE

    def _put_fallen(self, error_NE: torch.Tensor, ranked_NE: torch.Tensor, rest_NE: torch.Tensor) -> None:
        """Correct ``error_NE`` where a winning group loses its place without an expert that its score rests on."""
        rule, size = self._routing, ranked_NE.shape[1] // self._routing.groups
        count = 1 if rule.group_score == "max" else 2
        values_NGs, at_NGs = ranked_NE.unflatten(-1, (rule.groups, size)).topk(min(count + 1, size), dim=-1)
        if size == count:
            values_NGs = torch.nn.functional.pad(values_NGs, (0, 1), value=-torch.inf)
        order_NG = values_NGs[..., :count].sum(-1).topk(rule.kept_groups + 1, dim=-1)
        winners_Ng, next_N1 = order_NG.indices[:, :-1], order_NG.indices[:, -1:]
        best_Ngs = values_NGs.gather(1, winners_Ng[..., None].expand(-1, -1, count + 1))
        # What a group's score is without each of the experts that make it up.
        without_Ngs = torch.stack(
            [best_Ngs[..., [at for at in range(count + 1) if at != gone]].sum(-1) for gone in range(count)], dim=-1
        )
        falls_Ngs = without_Ngs < order_NG.values[:, -1:, None]
        needed_Ngs = (at_NGs[..., :count] + size * torch.arange(rule.groups)[:, None]).gather(
            1, winners_Ng[..., None].expand(-1, -1, count)
        )
        # Of each winner that falls: the choice among the others and the next.
        wins_NgG = torch.zeros(len(ranked_NE), rule.kept_groups, rule.groups, dtype=torch.bool)
        wins_NgG.scatter_(-1, winners_Ng[:, None].expand(-1, rule.kept_groups, -1), True)
        wins_NgG.scatter_(-1, winners_Ng[..., None], False)
        wins_NgG.scatter_(-1, next_N1[:, None].expand(-1, rule.kept_groups, -1), True)
        rows_R, winner_R = falls_Ngs.any(-1).nonzero(as_tuple=True)
        inside_RE = ranked_NE[rows_R].masked_fill(~wins_NgG[rows_R, winner_R].repeat_interleave(size, -1), -torch.inf)
        values_Rk, chosen_Rk = inside_RE.topk(self._top_k, dim=-1)
        terms = self._terms(chosen_Rk[:, None], torch.ones(1, self._top_k), rows_R)[:, 0]
        needed_Rs = needed_Ngs[rows_R, winner_R]
        fallen_Rs = self._error(terms, rest_NE[rows_R[:, None], needed_Rs], rows_R)
        fallen_Rs.masked_fill_(values_Rk[:, -1:] == -torch.inf, torch.inf)
        place = falls_Ngs[rows_R, winner_R]
        error_NE[rows_R[:, None].expand_as(needed_Rs)[place], needed_Rs[place]] = fallen_Rs[place]

    def _rest(self, mask_E: torch.Tensor) -> torch.Tensor:
        """Return the sum of p over those that stay [N, 1]."""
        return (self._scores_NE @ mask_E.double())[:, None]

    def _ranked(self, mask_E: torch.Tensor) -> torch.Tensor:
        """Return what the choice goes by [N, E]: -inf for those that are gone."""
        ranked_NE = self._scores_NE
        if self._bias_E is not None:
            ranked_NE = (ranked_NE / self._rest(mask_E) if self._softmax else ranked_NE) + self._bias_E
        return ranked_NE.masked_fill(~mask_E, -torch.inf)

    def _inside(self, ranked_NE: torch.Tensor) -> torch.Tensor:
        return self._routing.ranked(ranked_NE, None) if self._has_groups else ranked_NE

    def _chosen(self, mask_E: torch.Tensor) -> torch.Tensor:
        return self._inside(self._ranked(mask_E)).topk(self._top_k, dim=-1).indices

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
