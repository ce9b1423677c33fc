"""End-to-end recovery: a few hundred steps, judged on text that they do not see, the best state kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.loading import DTYPES
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import UsageError
from moesurgeon.progress import SILENT, Progress
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.closed import Sums, closed
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.floor import starves, use_of
from moesurgeon.recovery.judge import Judge, Judgement
from moesurgeon.recovery.layers import outputs, recomputed
from moesurgeon.recovery.log import Log
from moesurgeon.recovery.monitor import Counts, changed_experts
from moesurgeon.recovery.objective import refuse_without_gradient
from moesurgeon.recovery.result import Recovered, Training
from moesurgeon.recovery.schedule import endless, pace
from moesurgeon.recovery.state import Store
from moesurgeon.recovery.targets import Part, parts_of, refuse_unwritable, targets_of
from moesurgeon.recovery.teacher import Itself, Said, Teacher
from moesurgeon.recovery.teacher_cache import Cached
from moesurgeon.recovery.terms import Heard, Terms, terms_of
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
    model: PreTrainedModel,
    teacher: Cached | Anatomy,
    text: Corpus,
    heldout: Corpus,
    training: Training,
    *,
    store: Store | None = None,
    log: Log | None = None,
    progress: Progress = SILENT,
) -> Recovered:
    """Train ``model``, which holds the weights of ``student``, and return the best state on ``heldout``.

    ``teacher``: what it said, or the anatomy by which the student itself is the teacher. ``model`` is consumed.
    Raises UsageError if the objective does not reach what is trained, CheckpointError for what could not be stored.
    """
    with ExitStack() as stack:
        run = _Run(stack, student, model, teacher, (text, heldout), training)
        return run.result(store, log or Log(), progress)


class _Run:
    """One training from where it is to its end."""

    def __init__(
        self,
        stack: ExitStack,
        student: Stream,
        model: PreTrainedModel,
        teacher: Cached | Anatomy,
        corpora: tuple[Corpus, Corpus],
        training: Training,
    ) -> None:
        self.student, self.model, self.text, self.training = student, model, corpora[0], training
        anatomy, schedule = student.anatomy, training.schedule
        refuse_without_gradient(anatomy, training.losses, training.adapt)
        self.parts = parts_of(training.adapt)
        targets = targets_of(model, anatomy, training.adapt)
        refuse_unwritable(student, targets)
        # The plain language-model loss is run on the gate as it is; distillation through the estimator.
        is_plain = training.losses.objective == "lm" or "routers" not in self.parts
        candidates = anatomy.top_k if is_plain else schedule.candidates
        self.learning = stack.enter_context(
            learning_routers(model, anatomy, candidates=candidates, capacity=schedule.capacity)
        )
        if schedule.recompute:
            stack.enter_context(recomputed(model, anatomy))
        self.judge = Judge(model, anatomy, self.learning, corpora[1], training.length)
        self.before = self.judge.judged()
        self.teacher_sums, teacher_counts = self._teacher_on_heldout(teacher)
        torch.manual_seed(schedule.seed)
        experts = None
        if training.changed is not None:
            assert training.experts is not None
            experts = changed_experts(
                anatomy, self.before.counts, teacher_counts, dict(training.experts), training.changed
            )
        self.adapted = Adapted(model, targets, rank=schedule.rank, experts=experts)
        self.teacher: Teacher | None = None
        if training.losses.from_teacher:
            self.teacher = (
                Itself(model, self.adapted, self.learning, teacher, training.losses)
                if isinstance(teacher, Anatomy)
                else teacher
            )

    def result(self, store: Store | None, log: Log, progress: Progress) -> Recovered:
        """Train to the end and return what came of it."""
        schedule, training = self.training.schedule, self.training
        weights = self.adapted.weights()
        found = Recovered(None, {}, 0.0, sum(weight.numel() for weight in weights))
        best_loss, best, best_judged, worse = self.before.loss, None, self.before, 0
        optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95), weight_decay=0.0)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, schedule.steps, schedule.warmup))
        accelerator = Accelerator(cpu=self.model.device.type == "cpu", step_scheduler_with_optimizer=False)
        model, optimizer, rate = accelerator.prepare(self.adapted.model, optimizer, rate)
        if store and (state := store.load()):
            self.adapted.load(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            rate.load_state_dict(state["rate"])
            best_loss, best, worse = state["best_loss"], state["best"], state["worse"]
            found.steps, found.log, found.gradient_norm = state["step"], state["log"], state["norm"]
        rows = max(1, schedule.tokens_per_step // training.length)
        batches = endless(self.text, rows, schedule.seed, self.model.device, done=found.steps)
        with progress.task("recovering", schedule.steps, "steps") as advance:
            advance(found.steps)
            while found.steps < schedule.steps and not (schedule.patience and worse >= schedule.patience):
                found.steps += 1
                batch = next(batches)
                terms = self._losses(model, batch)
                if found.steps == 1:
                    found.gradient_norm = self._first_norm(terms.main)
                accelerator.backward(terms.main + terms.beside)
                accelerator.clip_grad_norm_(weights, schedule.clip)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                advance(1)
                if found.steps % schedule.judge_every and found.steps != schedule.steps:
                    continue
                judged = self._judged(self.parts)
                usage = self._use(judged)
                found.log.append({"step": found.steps, **terms.figures, "heldout": judged.loss, "usage": usage})
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
                            "best_loss": best_loss,
                            "best": best,
                            "worse": worse,
                            "log": found.log,
                            "norm": found.gradient_norm,
                        }
                    )
        if best is not None:
            self.adapted.load(best)
            found.tensors = self._stored(self.parts)
            best_judged = self._judged(self.parts, found.tensors)
            found.parts = {part: self._closed(self._alone(part, best_judged)) for part in self.parts}
        found.closed = self._closed(best_judged, domains=True)
        found.usage = {"before": self._use(self.before), "after": self._use(best_judged)}
        return found

    def _losses(self, model: Any, batch: Batch) -> Terms:
        """Run the student on ``batch`` and return what is to become small."""
        losses, anatomy = self.training.losses, self.student.anatomy
        said = self.teacher.says(batch) if self.teacher else Said()
        self.learning.routed.clear()
        self.learning.is_text = batch.is_text.flatten()
        with ExitStack() as stack:
            hidden = stack.enter_context(outputs(self.model, anatomy)) if losses.hidden else []
            logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
        routed = self.learning.routed[: len(anatomy.moe_layers)]
        return terms_of(
            losses, self.learning.rule, Heard(logits, routed, hidden), said, batch, routers="routers" in self.parts
        )

    def _first_norm(self, main: torch.Tensor) -> float:
        """Return the norm of the gradient; UsageError if it is noise.

        Without the balancing loss, whose gradient would hide that the objective has none.
        """
        part: Part = self.parts[0]
        parts = torch.autograd.grad(main, self.adapted.weights(part), retain_graph=True)
        norm = float(torch.nn.utils.get_total_norm(parts))
        refuse_noise(norm, part)
        return norm

    def _groups(self) -> list[dict[str, Any]]:
        schedule, rate = self.training.schedule, self.training.schedule.learning_rate
        whole = WHOLE if "full-routers" in self.training.adapt else 1.0
        own = rate if schedule.expert_rate is None else schedule.expert_rate
        rates = {"routers": rate * whole, "experts": own}
        return [{"params": self.adapted.weights(part), "lr": rates[part]} for part in self.parts]

    def _stored(self, parts: Sequence[Part]) -> dict[str, torch.Tensor]:
        """Return the weights of ``parts`` as they are by now, rounded as they will be stored, on the CPU."""
        return {name: as_stored(self.student, name, weight) for name, weight in self.adapted.merged(parts)}

    def _judged(self, parts: Sequence[Part], tensors: Mapping[str, torch.Tensor] | None = None) -> Judgement:
        with self.adapted.running_with(self._stored(parts) if tensors is None else tensors):
            return self.judge.judged()

    def _use(self, judged: Judgement) -> dict[str, dict[str, Any]]:
        return use_of(self.student.anatomy, self.before, judged, self.training.schedule.min_share)

    def _alone(self, part: Part, everything: Judgement) -> Judgement:
        return everything if len(self.parts) == 1 else self._judged((part,))

    def _closed(self, judged: Judgement, *, domains: bool = False) -> dict[str, Any]:
        figures = closed(judged.measured, self.before.sums, judged.sums, self.teacher_sums)
        return figures if domains else {"loss": figures["loss_after"], "gap_closed": figures["gap_closed"]}

    def _teacher_on_heldout(self, teacher: Cached | Anatomy) -> tuple[Sums, Counts]:
        """Return the teacher's losses by window and whom its routers choose."""
        if isinstance(teacher, Cached):
            return teacher.heldout, teacher.counts
        with self.learning.routing_as(teacher):
            judged = self.judge.judged()
        return judged.sums, judged.counts


def as_stored(student: Stream, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return what writing ``weight`` under the running name ``name`` makes of it, in the dtype it is stored in."""
    dtypes = {DTYPES[student.anatomy.tensors[piece.source].dtype] for piece in student.stored_parts(name)}
    rounded = student.as_stored(name, weight.cpu())
    return rounded.to(dtypes.pop()) if len(dtypes) == 1 else rounded


def refuse_noise(norm: float, part: Part = "routers") -> None:
    """Raise UsageError for a gradient that is what rounding leaves of zero."""
    if not norm > NOISE:
        raise UsageError(
            f"the gradient at the {part} has norm {norm:.1e}, which is rounding noise: this objective does not reach "
            "them; use --objective distill and more than one candidate"
        )
