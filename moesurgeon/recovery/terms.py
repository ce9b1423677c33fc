"""The terms of one step: what the objective asks for, and what keeps routers in shape beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesurgeon.engine.batches import Batch
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
    ``figures``: each of them before its coefficient."""

    main: torch.Tensor
    beside: torch.Tensor
    figures: dict[str, float]


def terms_of(losses: Losses, rule: Routing, student: Heard, said: Said, batch: Batch, *, routers: bool) -> Terms:
    """Return the terms of a step; ``routers``: whether they are trained.

    Balance and z are for routers that change: experts alone must not pay for what they cannot help.
    """
    text = batch.is_text
    terms: dict[str, tuple[float, torch.Tensor]] = {}
    if losses.objective == "distill":
        terms["kl"] = (1.0, said.divergence(student.logits, text, losses.temperature))
    if losses.objective == "lm" or losses.lm:
        factor = losses.lm if losses.objective == "distill" else 1.0
        terms["lm"] = (factor, language_loss(student.logits, batch.tokens, text))
    if losses.router:
        terms["router"] = (losses.router, router_distillation(rule, student.routed, said.routers, text))
    if losses.hidden:
        terms["hidden"] = (losses.hidden, hidden_loss(student.hidden, said.hidden, text))
    main = torch.stack([factor * term for factor, term in terms.values()]).sum()
    figures = {"loss": main.item(), **{name: term.item() for name, (_, term) in terms.items()}}
    balance = balance_loss(rule, student.routed, text)
    figures["balance"] = balance.item()
    beside = losses.balance * balance
    if losses.z:
        size = z_loss(student.routed, text)
        figures["z"] = size.item()
        beside = beside + losses.z * size
    return Terms(main, beside if routers else torch.zeros_like(beside), figures)
