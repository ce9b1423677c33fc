"""The router's rule of each family, in plain torch: what the profiler checks the model against.

Legend: T tokens, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesurgeon.engine.model import MoeBlock
from moesurgeon.families.keys import value_at
from moesurgeon.surgery.anatomy import Anatomy

_FEW = 8  # Experts of which torch takes the softmax nine times as fast across tokens as along each token's row.


@dataclass(frozen=True, slots=True)
class Routing:
    """How a checkpoint routes: its family's rule with the numbers of its config."""

    scoring: str
    renormalises: bool
    scale: float
    groups: int
    kept_groups: int
    group_score: str
    epsilon: float = 0.0

    def scores(self, logits_TE: torch.Tensor, *, as_stock: bool = True) -> torch.Tensor:
        """Return each expert's score [T, E] in float32: softmax or sigmoid of the logits.

        ``as_stock``: with the last bit of what the model itself computes; statistics can do without.
        """
        logits_TE = logits_TE.float()
        if self.scoring != "softmax":
            return logits_TE.sigmoid()
        if not as_stock and logits_TE.ndim == 2 and logits_TE.shape[1] <= _FEW:
            return logits_TE.t().contiguous().softmax(0).t()
        return logits_TE.softmax(-1)

    def ranked(self, scores_TE: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        """Return what the choice goes by [T, E]: scores with the bias, -inf outside the winning groups."""
        ranked = scores_TE if bias_E is None else scores_TE + bias_E.float()
        if self.groups > 1:
            grouped = ranked.unflatten(-1, (self.groups, -1))
            best = 1 if self.group_score == "max" else 2
            group_scores_TG = grouped.topk(best, dim=-1).values.sum(-1)
            winners = group_scores_TG.topk(self.kept_groups, dim=-1).indices
            inside = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter_(-1, winners, True)
            ranked = grouped.masked_fill(~inside[..., None], float("-inf")).flatten(-2)
        return ranked

    def choose(self, scores_TE: torch.Tensor, bias_E: torch.Tensor | None, top_k: int) -> torch.Tensor:
        """Return the chosen experts [T, K], the best first."""
        return self.ranked(scores_TE, bias_E).topk(top_k, dim=-1).indices

    def weights(self, scores_TE: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Return the weights [T, K] of the chosen experts."""
        weights = scores_TE.gather(-1, chosen_TK)
        if self.renormalises:
            weights = weights / (weights.sum(-1, keepdim=True) + self.epsilon)
        return weights * self.scale


def routing_of(anatomy: Anatomy) -> Routing:
    """Return how ``anatomy`` routes."""
    rule = anatomy.family.router
    groups, kept = anatomy.groups
    scale = value_at(anatomy.config, rule.scale_key)
    scale = rule.scale_default if scale is None else float(scale)
    score = rule.groups.score if rule.groups else "max"
    return Routing(rule.scoring, anatomy.renormalises, scale, groups, kept, score, rule.epsilon)


def selection_bias(block: MoeBlock) -> torch.Tensor | None:
    """Return the bias [E] that takes part in the choice only, where the block has one."""
    bias = getattr(block.bias_holder, block.bias_name, None)
    return bias.flatten() if isinstance(bias, torch.Tensor) else None
