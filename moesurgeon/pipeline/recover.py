"""``recover``: adapt the routers of an edited checkpoint to what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.checkpoint.open import CONFIG_NAME
from moesurgeon.checkpoint.writer import content_key
from moesurgeon.engine.device import Placement, place
from moesurgeon.engine.whole import load_model
from moesurgeon.errors import CheckpointError, NothingToDo, UsageError
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.text import read_text, window_length
from moesurgeon.pipeline.write import finish, refuse_output
from moesurgeon.progress import SILENT, Progress
from moesurgeon.recovery.adapters import STORED
from moesurgeon.recovery.objective import Losses, refuse_without_gradient
from moesurgeon.recovery.train import Recovered, Schedule, recover_routers
from moesurgeon.runtime.cost import count_parameters
from moesurgeon.surgery import edits
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, identity


@dataclass(frozen=True, kw_only=True)
class RecoverSpec:
    """``teacher``: the unedited checkpoint. ``heldout_tokens`` bounds the text that judges."""

    teacher: str
    losses: Losses = field(default_factory=Losses)
    schedule: Schedule = field(default_factory=Schedule)
    heldout_tokens: int = 16384


def recover(
    source: str,
    spec: RecoverSpec,
    text: Text,
    running: Running,
    writing: Writing,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train the routers of ``source`` towards ``spec.teacher`` and write the best state.

    Trains on the calibration split (of the user's traces on the train split, the largest) and judges on
    the validation split. Where no state beats the start on held-out text, nothing is written
    (NothingToDo) unless ``writing`` allows a copy.
    """
    subject, teacher = open_subject(source), open_subject(spec.teacher)
    refuse_output(writing.output, CONFIG_NAME, overwrite=writing.overwrite, sources=(subject.root, teacher.root))
    refuse_without_gradient(subject.anatomy, spec.losses.objective)
    _refuse_unwritable(subject, writing)
    placement = place(running.device, running.dtype, subject.stored_dtype)
    _refuse_too_large([subject, teacher], placement, running)
    length = window_length(subject, text)
    if text.split in ("validation", "all"):
        raise UsageError(
            f"--split {text.split} would train on the text that judges the result; use train or calibration"
        )
    corpus = read_text(subject, text, builtin_split="calibration", own_split="train")
    heldout_text = text.even(max_tokens=spec.heldout_tokens, split="validation")
    heldout = read_text(subject, heldout_text, builtin_split="validation")
    if spec.losses.objective == "distill" and subject.fingerprint == teacher.fingerprint:
        raise UsageError(
            f"{source} is its own teacher, so there is nothing to learn; give the checkpoint before the surgery"
        )
    report: dict[str, Any] = {
        "teacher": spec.teacher,
        "tokens": sum(corpus.tokens.values()),
        "heldout_tokens": sum(heldout.tokens.values()),
        "domains": dict(corpus.tokens),
        "splits": dict(corpus.splits),
        "placement": str(placement),
    }
    if writing.dry_run:
        return {**report, "source": source, "output": str(writing.output), "dry_run": True}
    recovered = recover_routers(
        # Eager experts gather by index, whose gradient one thread of a CPU adds up.
        load_model(subject.checkpoint, subject.anatomy, placement, experts="grouped_mm"),
        load_model(teacher.checkpoint, teacher.anatomy, placement),
        subject.anatomy,
        teacher.anatomy,
        corpus,
        heldout,
        length=length,
        losses=spec.losses,
        schedule=spec.schedule,
        progress=progress,
    )
    if recovered.routers is None and not writing.allow_noop:
        raise NothingToDo(
            f"recovery found nothing better than the start on held-out text (loss {recovered.loss_before:.4f}); "
            "nothing was written: try more steps, another learning rate or --allow-noop"
        )
    origin = {"teacher": teacher.fingerprint, "traces": corpus.hashes, "heldout_traces": heldout.hashes}
    plan = plan_routers(subject, recovered, spec, origin)
    return {
        **report,
        **recovered.as_dict(),
        **finish(plan, subject, writing, progress),
    }


def _refuse_too_large(subjects: Sequence[Subject], placement: Placement, running: Running) -> None:
    """Raise UsageError where training would need what it cannot have: it holds both checkpoints on one device."""
    if placement.spread:
        raise UsageError("recover trains on one device; name it, as in --device cuda:0")
    needed = sum(count_parameters(subject.anatomy).total * placement.dtype.itemsize for subject in subjects)
    if running.max_memory is not None and needed > running.max_memory:
        raise UsageError(
            f"recover holds both checkpoints in memory, {needed:,} bytes, and may use {running.max_memory:,}; "
            "allow more or choose a smaller dtype"
        )


def _refuse_unwritable(subject: Subject, writing: Writing) -> None:
    """Raise now what writing the result would raise after the training."""
    if writing.layout is not None:
        plan_layout(subject.anatomy, writing.layout)
    for layer in subject.anatomy.moe_layers:
        router = subject.anatomy.tensors[subject.anatomy.router_weight(layer)]
        if router.dtype not in STORED:
            raise CheckpointError(
                f"{router.name} is stored as {router.dtype}; only {', '.join(STORED)} can be trained: convert it"
            )


def plan_routers(subject: Subject, recovered: Recovered, spec: RecoverSpec, origin: Mapping[str, Any]) -> EditPlan:
    """Plan to replace the router weights, in the dtypes that they are stored in, and nothing else.

    ``origin`` goes into the record: fingerprint of the teacher, hashes of the text.
    """
    plan = identity(subject.anatomy)
    if recovered.routers is None:
        return plan
    outputs = dict(plan.outputs)
    for layer, weight in recovered.routers.items():
        name = subject.anatomy.router_weight(layer)
        stored = subject.anatomy.tensors[name]
        load = partial(tensor_bytes, weight, stored)
        outputs[name] = edits.replace(stored, load, key=content_key(load()))
    record = {
        "operation": "recover",
        "replaced": [subject.anatomy.router_weight(layer) for layer in recovered.routers],
        **origin,
        "objective": asdict(spec.losses),
        "schedule": asdict(spec.schedule),
        "heldout_loss": {"before": recovered.loss_before, "after": recovered.loss_after},
    }
    return EditPlan(outputs, record=[record])


def tensor_bytes(tensor: torch.Tensor, stored: TensorSpec) -> bytes:
    """Return the bytes of ``tensor``, which is of the dtype and shape that ``stored`` names."""
    assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, STORED[stored.dtype])
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
