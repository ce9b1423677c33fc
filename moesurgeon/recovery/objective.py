"""What recovery minimises, and which objectives cannot reach a router at all.

Legend: B windows, T tokens of a window, N tokens of text, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from moesurgeon.engine.routing import Routing
from moesurgeon.errors import UsageError
from moesurgeon.recovery.estimator import Routed
from moesurgeon.recovery.targets import parts_of
from moesurgeon.surgery.anatomy import Anatomy

Objective = Literal["distill", "lm"]
_Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """``objective``: distillation from the teacher, or the language-model loss. ``temperature`` softens both
    distributions of the distillation.

    Coefficients of what is added: ``lm`` (the language-model loss beside distillation), ``router`` (the teacher's
    distribution over the experts), ``hidden`` (its hidden states after every layer), ``balance`` (load balancing,
    taken layer by layer) and ``z`` (small router logits).
    """

    objective: Objective = "distill"
    balance: _Coefficient = 0.01
    temperature: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 1.0
    lm: _Coefficient = 0.0
    router: _Coefficient = 0.0
    hidden: _Coefficient = 0.0
    z: _Coefficient = 0.0

    @property
    def from_teacher(self) -> bool:
        """Whether the teacher has a say while training."""
        return self.objective == "distill" or self.router > 0 or self.hidden > 0


def refuse_without_gradient(anatomy: Anatomy, losses: Losses, adapt: Sequence[str] = ("routers",)) -> None:
    """Raise UsageError where ``losses`` would train the routers on rounding noise.

    A renormalised single weight is p / p = 1 whatever the router says, so the language-model loss does
    not depend on it; what autograd returns (about 1e-9) is the rounding of that division.
    """
    reaches = losses.objective != "lm" or losses.router > 0
    if not reaches and "routers" in parts_of(adapt) and anatomy.renormalises and anatomy.top_k == 1:
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


def balance_of(routing: Routing, logits_NE: torch.Tensor, share_E: torch.Tensor) -> torch.Tensor:
    """Return E x sum_e ``share_E`` x (mean score share) of one layer, for these shares of the choices; 1 when even.

    The loss of Switch Transformers (arXiv:2101.03961, eq. 4), for each layer by itself: the form in transformers adds
    the layers up first, so that two lopsided layers can cancel.
    """
    scores = routing.scores(logits_NE)
    shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return scores.shape[-1] * (share_E * shares).sum()


def router_distillation(routing: Routing, routed: Routed, teacher_NE: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of KL(teacher | student) between the distributions of one layer's routers.

    ``teacher_NE``: the teacher's logits of the tokens of ``text`` [B, T], of the student's experts in the student's
    order. Scores are divided by their sum, so that of a pruned layer the experts that both have share 1.
    """
    p, q = (routing.scores(each) for each in (routed.logits[text.flatten()], teacher_NE))
    logp, logq = ((each / each.sum(-1, keepdim=True)).clamp_min(1e-30).log() for each in (p, q))
    return (logq.exp() * (logq - logp)).sum(-1).mean()


def z_loss(routed: Routed, text: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of logsumexp(router logits)^2 of one layer (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return routed.logits[text.flatten()].float().logsumexp(-1).square().mean()
