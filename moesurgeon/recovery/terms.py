"""The terms of one step: what the objective asks for, and what keeps routers in shape beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesurgeon.engine.routing import Routing
from moesurgeon.recovery.estimator import Routed
from moesurgeon.recovery.objective import (
    Losses,
    balance_loss,
    hidden_loss,
    language_loss,
    router_distillation,
    z_loss,
)
from moesurgeon.recovery.share import Share
from moesurgeon.recovery.teacher import Said


@dataclass(frozen=True)
class Heard:
    """What the student made of a batch: ``logits`` [B, T, V], ``routed`` by mixture layer, ``hidden`` [B, T, H] by
    layer where it is asked for."""

    logits: torch.Tensor
    routed: Sequence[Routed]
    hidden: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Terms:
    """``main``: the objective; ``beside``: what is added to it, and must not hide that the objective has no gradient;
    ``figures``: each of them before its coefficient, of all processes."""

    main: torch.Tensor
    beside: torch.Tensor
    figures: dict[str, float]


def terms_of(losses: Losses, rule: Routing, student: Heard, said: Said, share: Share, *, routers: bool) -> Terms:
    """Return what this process's ``share`` adds to the terms of a step; ``routers``: whether they are trained.

    Balance and z are for routers that change: experts alone must not pay for what they cannot help.
    """
    batch, text = share.batch, share.batch.is_text
    terms: dict[str, tuple[float, torch.Tensor]] = {}
    if losses.objective == "distill":
        terms["kl"] = (1.0, share.text * said.divergence(student.logits, text, losses.temperature))
    if losses.objective == "lm" or losses.lm:
        factor = losses.lm if losses.objective == "distill" else 1.0
        # Nothing is predicted in windows of one token, and the mean of nothing is not a number.
        found = language_loss(student.logits, batch.tokens, text) if share.predicted else 0.0 * student.logits.sum()
        terms["lm"] = (factor, share.predicted * found)
    if losses.router:
        terms["router"] = (losses.router, share.text * router_distillation(rule, student.routed, said.routers, text))
    if losses.hidden:
        found = hidden_loss(student.hidden, said.hidden, text, share.summed)
        terms["hidden"] = (losses.hidden, float(share.text > 0) * found)
    main = torch.stack([factor * term for factor, term in terms.values()]).sum()
    figures = {"loss": main, **{name: term for name, (_, term) in terms.items()}}
    balance = share.text * balance_loss(rule, student.routed, text, share.summed)
    figures["balance"] = balance
    beside = losses.balance * balance
    if losses.z:
        size = share.text * z_loss(student.routed, text)
        figures["z"] = size
        beside = beside + losses.z * size
    sums = share.summed(torch.stack([each.detach().float() for each in figures.values()])).tolist()
    return Terms(main, beside if routers else torch.zeros_like(beside), dict(zip(figures, sums, strict=True)))
