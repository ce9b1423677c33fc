"""What recovery minimises, and which objectives cannot reach a router at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from moesurgeon.engine.routing import Routing
from moesurgeon.errors import UsageError
from moesurgeon.recovery.estimator import Routed
from moesurgeon.surgery.anatomy import Anatomy

Objective = Literal["distill", "lm"]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """``objective``: distillation from the teacher, or the language-model loss.

    ``balance``: coefficient of the load-balancing loss, taken layer by layer. ``temperature`` softens
    both distributions of the distillation.
    """

    objective: Objective = "distill"
    balance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    temperature: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 1.0


def refuse_without_gradient(anatomy: Anatomy, objective: Objective) -> None:
    """Raise UsageError where ``objective`` would train the routers on rounding noise.

    A renormalised single weight is p / p = 1 whatever the router says, so the language-model loss does
    not depend on it; what autograd returns (about 1e-9) is the rounding of that division.
    """
    if objective == "lm" and anatomy.renormalises and anatomy.top_k == 1:
        raise UsageError(
            f"--objective lm cannot train the routers of a top-1 {anatomy.family.title}: the gate renormalises, so the "
            "weight is the constant 1 and the gradient is rounding noise; use --objective distill"
        )


def distillation(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return mean KL(teacher | student) in nats over the ``valid`` [B, T] positions of logits [B, T, V].

    Scaled by temperature^2, so that its gradient keeps its size (Hinton et al., arXiv:1503.02531).
    """
    logp = (student[valid].float() / temperature).log_softmax(-1)
    logq = (teacher[valid].float() / temperature).log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1).mean() * temperature**2


def language_loss(student: torch.Tensor, tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of predicting tokens [B, T] from the logits before them."""
    valid = text[:, 1:]
    return torch.nn.functional.cross_entropy(student[:, :-1][valid].float(), tokens[:, 1:][valid])


def balance_loss(routing: Routing, routed: list[Routed], text: torch.Tensor) -> torch.Tensor:
    """Return the mean over layers of E x sum_e (share of choices) x (mean score share); 1 when even.

    Choices are the block's own, a selection bias included; ``text`` [B, T] leaves out padding.

    The loss of Switch Transformers (arXiv:2101.03961, eq. 4), for each layer by itself: the form in
    transformers adds the layers up first, so that two lopsided layers can cancel.
    """
    rows = text.flatten()
    losses = []
    for layer in routed:
        scores = routing.scores(layer.logits[rows])
        chosen = layer.chosen[rows].flatten().bincount(minlength=scores.shape[-1])
        shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
        losses.append(scores.shape[-1] * (chosen / chosen.sum() * shares).sum())
    return torch.stack(losses).mean()
