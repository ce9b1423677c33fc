"""End-to-end recovery of routers: a few hundred steps, judged on text that they do not see."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from transformers import PreTrainedModel

from moesurgeon.engine.batches import Batch, batches_of, rows_for, to_batch
from moesurgeon.engine.model import logits_of
from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.errors import UsageError
from moesurgeon.evaluation.measure import LOSS, TEACHER_LOSS, Measurement, measure
from moesurgeon.progress import SILENT, Progress
from moesurgeon.recovery.adapters import adapt_routers, adapted_routers, running_with
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.objective import (
    Losses,
    balance_loss,
    distillation,
    language_loss,
    refuse_without_gradient,
)
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.traces.windows import Corpus

# Below this the gradient of the routers is what rounding leaves of zero (measured: 5e-9 for a
# renormalised top-1 gate, 3e-2 and more for an objective that reaches the router).
NOISE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and pace of the training. ``candidates``: experts that get a gradient; None: all.

    The bounds are for recipes; the command line has its own.
    """

    steps: Annotated[int, Field(ge=1)] = 200
    tokens_per_step: Annotated[int, Field(ge=8)] = 4096
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3e-3
    rank: Annotated[int, Field(ge=1)] = 4
    judge_every: Annotated[int, Field(ge=1)] = 50
    candidates: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


@dataclass
class Recovered:
    """``routers``: best weights [E, H] by layer as they will be stored, None if nothing beat the start.

    ``gradient_norm``: of the objective alone, without the balancing loss, at the first step.
    """

    routers: dict[int, torch.Tensor] | None
    loss_before: float
    loss_after: float
    teacher_loss: float
    gradient_norm: float
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gap_closed(self) -> float | None:
        """The share of the held-out loss gap to the teacher that recovery closed."""
        gap = self.loss_before - self.teacher_loss
        return (self.loss_before - self.loss_after) / gap if gap > 0 else None

    def as_dict(self) -> dict[str, Any]:
        return {
            **{key: value for key, value in asdict(self).items() if key != "routers"},
            "gap_closed": self.gap_closed,
        }


def recover_routers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    teacher_anatomy: Anatomy,
    train: Corpus,
    heldout: Corpus,
    *,
    length: int,
    losses: Losses,
    schedule: Schedule,
    progress: Progress = SILENT,
) -> Recovered:
    """Train adapters on the routers of ``student`` and return the best state on ``heldout``.

    ``student`` is consumed. Raises UsageError if the objective does not reach the routers.
    """
    refuse_without_gradient(anatomy, losses.objective)
    torch.manual_seed(schedule.seed)
    judge = _Judge(student, anatomy, heldout, length)
    before = judge.measured(Stream(Source.of_model(teacher, teacher_anatomy)), progress)
    count = before.positions.sum()
    loss_before = float(before.sums[:, LOSS].sum() / count)
    teacher_loss = float(before.sums[:, TEACHER_LOSS].sum() / count)
    result = Recovered(None, loss_before, loss_before, teacher_loss, 0.0)
    # The plain language-model loss is run on the gate as it is; distillation through the estimator.
    candidates = anatomy.top_k if losses.objective == "lm" else schedule.candidates
    with learning_routers(student, anatomy, candidates=candidates) as routed:
        model = adapt_routers(student, anatomy, rank=schedule.rank)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        pace = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, schedule.steps))
        accelerator = Accelerator(cpu=student.device.type == "cpu", step_scheduler_with_optimizer=False)
        model, optimizer, pace = accelerator.prepare(model, optimizer, pace)
        routing = routing_of(anatomy)
        batches = _endless(train, max(1, schedule.tokens_per_step // length), schedule.seed, student.device)
        with progress.task("recovering", schedule.steps, "steps") as advance:
            for step in range(1, schedule.steps + 1):
                batch = next(batches)
                routed.clear()
                loss = _loss(model, teacher, batch, losses)
                balance = balance_loss(routing, routed, batch.is_text)
                if step == 1:
                    # Without the balancing loss, whose gradient would hide that the objective has none.
                    parts = torch.autograd.grad(loss, weights, retain_graph=True)
                    result.gradient_norm = float(torch.nn.utils.get_total_norm(parts))
                    _refuse_noise(result.gradient_norm)
                accelerator.backward(loss + losses.balance * balance)
                accelerator.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                pace.step()
                optimizer.zero_grad()
                advance(1)
                if step % schedule.judge_every == 0 or step == schedule.steps:
                    routers = adapted_routers(model, anatomy)
                    with running_with(model, anatomy, routers):
                        judged = judge.loss()
                    result.log.append({"step": step, "loss": loss.item(), "balance": balance.item(), "heldout": judged})
                    if judged < result.loss_after:
                        result.loss_after, result.routers = judged, routers
    return result


class _Judge:
    """Measures ``student`` as it is on held-out text."""

    def __init__(self, student: PreTrainedModel, anatomy: Anatomy, heldout: Corpus, length: int) -> None:
        self._stream = Stream(Source.of_model(student, anatomy))
        self._domains = heldout.domains
        self._batches = list(batches_of(heldout, rows=rows_for(length), device=student.device))

    def measured(self, teacher: Stream, progress: Progress) -> Measurement:
        return measure(self._stream, self._domains, self._batches, teacher=teacher, progress=progress, label="judging")

    def loss(self) -> float:
        """Return the mean loss per predicted token."""
        measured = measure(self._stream, self._domains, self._batches)
        return float(measured.sums[:, LOSS].sum() / measured.positions.sum())


def _loss(model: Any, teacher: PreTrainedModel, batch: Batch, losses: Losses) -> torch.Tensor:
    logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
    if losses.objective == "lm":
        return language_loss(logits, batch.tokens, batch.is_text)
    return distillation(logits, logits_of(teacher, batch.tokens, batch.mask), batch.is_text, losses.temperature)


def _endless(corpus: Corpus, rows: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Yield shuffled batches, all domains mixed, epoch after epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(corpus.windows))
        for start in range(0, len(order), rows):
            yield to_batch([corpus.windows[index] for index in order[start : start + rows]], device)


def _pace(step: int, steps: int) -> float:
    """Warm up over a twentieth of the run, then decay with a cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _refuse_noise(norm: float) -> None:
    if not norm > NOISE:
        raise UsageError(
            f"the gradient at the routers has norm {norm:.1e}, which is rounding noise: this objective does not reach "
            "them; use --objective distill and more than one candidate"
        )
