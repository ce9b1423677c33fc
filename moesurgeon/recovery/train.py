"""End-to-end recovery: a few hundred steps, judged on text that they do not see, the best state kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from moesurgeon.engine.finite import NotFinite
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import UsageError
from moesurgeon.evaluation.decidable import gap_between
from moesurgeon.progress import SILENT, Progress
from moesurgeon.recovery.closed import Sums, closed
from moesurgeon.recovery.counted import Counted
from moesurgeon.recovery.floor import starves, use_of
from moesurgeon.recovery.folder import adapter_of
from moesurgeon.recovery.judge import Judgement
from moesurgeon.recovery.log import Log
from moesurgeon.recovery.monitor import Counts, changed_experts
from moesurgeon.recovery.objective import refuse_without_gradient
from moesurgeon.recovery.resident import Resident
from moesurgeon.recovery.result import Recovered, Training
from moesurgeon.recovery.schedule import endless, pace
from moesurgeon.recovery.state import Store
from moesurgeon.recovery.steps import Steps
from moesurgeon.recovery.streamed import Streamed, Streaming
from moesurgeon.recovery.targets import Part, parts_of
from moesurgeon.recovery.teacher_cache import Cached
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.traces.windows import Corpus

# Below this the gradient of the routers is what rounding leaves of zero (measured: 5e-9 for a
# renormalised top-1 gate, 3e-2 and more for an objective that reaches the router).
NOISE = 1e-6
# Of the learning rate, for routers that are trained themselves: every weight of theirs takes a step of that size,
# where the product of an adapter's factors moves by less (tiny-mixtral, top-1: at 3e-3 nothing was won, at 3e-4 2 %).
WHOLE = 0.1


def train(
    student: Stream,
    model: PreTrainedModel | Streaming,
    teacher: Cached | Anatomy,
    text: Corpus,
    heldout: Corpus,
    training: Training,
    *,
    ranks: Ranks | None = None,
    store: Store | None = None,
    log: Log | None = None,
    progress: Progress = SILENT,
) -> Recovered:
    """Train ``model``, which holds the weights of ``student``, and return the best state on ``heldout``.

    Or, without one, the layers of ``student`` as they are read. ``teacher``: what it said, or the anatomy by which
    the student itself is the teacher. ``model`` is consumed. Of several ``ranks`` each trains on rows of every batch,
    and all have the same result.
    Raises UsageError if the objective does not reach what is trained, CheckpointError for what could not be stored.
    """
    refuse_without_gradient(student.anatomy, training.losses, training.adapt)
    with ExitStack() as stack:
        steps: Steps
        if isinstance(model, Streaming):
            steps = Streamed(stack, student, model, heldout, training, ranks)
        else:
            steps = Resident(stack, student, model, heldout, training, ranks)
        counted = Counted(training, heldout, teacher)
        with progress.task("recovering", counted.total, "steps") as advance:
            run = _Run(counted.of(steps, advance), teacher, text, training)
            if warning := gap_between(run.before.measured, run.before.sums, run.teacher_sums).warning:
                progress.note(f"note: {warning}")
            return run.result(store, log or Log())


class _Run:
    """One training from where it is to its end: what does not depend on where the weights are."""

    def __init__(self, steps: Counted, teacher: Cached | Anatomy, text: Corpus, training: Training) -> None:
        self.steps, self.text, self.training = steps, text, training
        self.anatomy, self.parts = steps.anatomy, parts_of(training.adapt)
        self.before = steps.judged()
        self.teacher_sums, teacher_counts = self._teacher_on_heldout(teacher)
        torch.manual_seed(training.schedule.seed)
        experts = None
        if training.changed is not None:
            assert training.experts is not None
            experts = changed_experts(
                self.anatomy, self.before.counts, teacher_counts, dict(training.experts), training.changed
            )
            if not any(experts.values()):
                raise UsageError(
                    f"no expert's traffic differs from the teacher's by more than {training.changed:g} of it, so that "
                    "nothing of the experts would be trained; lower --changed or leave it out"
                )
        self.adapted = steps.begin(teacher, experts)

    def result(self, store: Store | None, log: Log) -> Recovered:
        """Train to the end and return what came of it."""
        schedule, training = self.training.schedule, self.training
        weights = self.adapted.weights()
        found = Recovered(None, {}, 0.0, sum(weight.numel() for weight in weights))
        best_loss, best, worse = self.before.loss, None, 0
        optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95), weight_decay=0.0)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, schedule.steps, schedule.warmup))
        accelerator = Accelerator(cpu=self.steps.device.type == "cpu", step_scheduler_with_optimizer=False)
        optimizer, rate = self.steps.prepare(accelerator, optimizer, rate)
        if store and (state := store.load()):
            self.adapted.load(state["weights"], state["importance"])
            optimizer.load_state_dict(state["optimizer"])
            rate.load_state_dict(state["rate"])
            best_loss, best, worse = state["best_loss"], state["best"], state["worse"]
            found.steps, found.log, found.gradient_norm = state["step"], state["log"], state["norm"]
            self.steps.done_before(found.steps)
        batches = endless(self.text, schedule.rows(training.length), schedule.seed, self.steps.device, done=found.steps)
        while found.steps < schedule.steps and not (schedule.patience and worse >= schedule.patience):
            found.steps += 1
            batch = next(batches)
            with self._converging(found.steps):
                given = self.steps.gradients(batch, self.parts[0] if found.steps == 1 else None)
            norm = {} if given.norm is None else {"the gradient": given.norm}
            self._refuse_divergence({**given.figures, **norm}, found.steps)
            if given.norm is not None:
                refuse_noise(given.norm, self.parts[0])
                found.gradient_norm = given.norm
            self.adapted.regularise()
            accelerator.clip_grad_norm_(weights, schedule.clip)
            optimizer.step()
            rate.step()
            self.adapted.allocate(found.steps)
            optimizer.zero_grad()
            if found.steps % schedule.judge_every and found.steps != schedule.steps:
                continue
            with self._converging(found.steps):
                judged = self.steps.judged(self.parts)
            usage = self._use(judged)
            found.log.append({"step": found.steps, **given.figures, "heldout": judged.loss, "usage": usage})
            worse += 1
            if judged.loss < best_loss and not (schedule.min_share and starves(usage)):
                best_loss, best, worse = judged.loss, self.adapted.state(), 0
            log.write(found.log)
            if store:
                store.save(
                    {
                        "step": found.steps,
                        "weights": self.adapted.state(),
                        "optimizer": optimizer.state_dict(),
                        "rate": rate.state_dict(),
                        "importance": self.adapted.importance(),
                        "best_loss": best_loss,
                        "best": best,
                        "worse": worse,
                        "log": found.log,
                        "norm": found.gradient_norm,
                    }
                )
        self._finish(found, best)
        return found

    @contextmanager
    def _converging(self, step: int) -> Iterator[None]:
        """Blame the training for hidden states that are not finite: before it they were."""
        try:
            yield
        except NotFinite as error:
            self._refuse_divergence({"hidden states": math.nan}, step, error)

    def _refuse_divergence(self, figures: Mapping[str, float], step: int, error: Exception | None = None) -> None:
        """Raise UsageError for ``figures`` that are not finite."""
        if all(math.isfinite(value) for value in figures.values()):
            return
        rate = self.training.schedule.learning_rate
        names = ", ".join(name for name, value in figures.items() if not math.isfinite(value))
        raise UsageError(
            f"training diverged at step {step} (not finite: {names}) with --learning-rate {rate:g}; lower it, or the "
            "coefficients and the temperature of the losses"
        ) from error

    def _finish(self, found: Recovered, best: dict[str, torch.Tensor] | None) -> None:
        """Put into ``found`` what the state ``best`` (None: that of the start) is, and is worth."""
        judged, ranks = self.before, self.adapted.ranks()
        if best is not None:
            self.adapted.load(best)
            found.tensors, found.adapter = self.steps.stored(self.parts), adapter_of(self.adapted)
            judged = self.steps.judged(self.parts, found.tensors)
            found.parts = {part: self._closed(self._alone(part, judged)) for part in self.parts}
        found.ranks = ranks and {"last": ranks, "written": self.adapted.ranks() if best is not None else None}
        found.closed = self._closed(judged, domains=True)
        found.usage = {"before": self._use(self.before), "after": self._use(judged)}

    def _groups(self) -> list[dict[str, Any]]:
        schedule, rate = self.training.schedule, self.training.schedule.learning_rate
        whole = WHOLE if "full-routers" in self.training.adapt else 1.0
        own = rate if schedule.expert_rate is None else schedule.expert_rate
        rates = {"routers": rate * whole, "experts": own}
        return [{"params": self.adapted.weights(part), "lr": rates[part]} for part in self.parts]

    def _use(self, judged: Judgement) -> dict[str, dict[str, Any]]:
        return use_of(self.anatomy, self.before, judged, self.training.schedule.min_share)

    def _alone(self, part: Part, everything: Judgement) -> Judgement:
        return everything if len(self.parts) == 1 else self.steps.judged((part,))

    def _closed(self, judged: Judgement, *, domains: bool = False) -> dict[str, Any]:
        figures = closed(judged.measured, self.before.sums, judged.sums, self.teacher_sums)
        return figures if domains else {"loss": figures["loss_after"], "gap_closed": figures["gap_closed"]}

    def _teacher_on_heldout(self, teacher: Cached | Anatomy) -> tuple[Sums, Counts]:
        """Return the teacher's losses by window and whom its routers choose."""
        if isinstance(teacher, Cached):
            return teacher.heldout, teacher.counts
        judged = self.steps.judged_as(teacher)
        return judged.sums, judged.counts


def refuse_noise(norm: float, part: Part = "routers") -> None:
    """Raise UsageError for a gradient that is what rounding leaves of zero."""
    if not norm > NOISE:
        raise UsageError(
            f"the gradient at the {part} has norm {norm:.1e}, which is rounding noise: this objective does not reach "
            "them; use --objective distill and more than one candidate"
        )
