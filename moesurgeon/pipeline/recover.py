"""``recover``: train the routers, and if asked the experts, of an edited checkpoint towards what it was."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import moesurgeon
from moesurgeon.checkpoint.open import CONFIG_NAME
from moesurgeon.engine.budget import free_bytes
from moesurgeon.engine.device import Placement, place
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.whole import filled
from moesurgeon.errors import CheckpointError, InputError, NothingToDo, UsageError
from moesurgeon.healing.planned import plan_healed
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.recover_teacher import (
    experts_of_teacher,
    healed_before,
    refuse_other_model,
    said_by,
    shares_weights,
    tokens_digest,
)
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.text import read_text, window_length
from moesurgeon.pipeline.write import finish, refuse_output
from moesurgeon.progress import SILENT, Progress
from moesurgeon.recovery.log import Log, check_log
from moesurgeon.recovery.memory import training_bytes
from moesurgeon.recovery.objective import Losses, refuse_without_gradient
from moesurgeon.recovery.result import Recovered, Training
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.state import Store
from moesurgeon.recovery.targets import WRITABLE, Adapt, check_adapt, parts_of
from moesurgeon.recovery.teacher_cache import Cached
from moesurgeon.recovery.train import train
from moesurgeon.runtime.cost import count_parameters
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, identity


@dataclass(frozen=True, kw_only=True)
class RecoverSpec:
    """``teacher``: the unedited checkpoint. ``heldout_tokens`` bounds the text that judges.

    ``adapt``: what is trained; ``changed``: of experts only those whose traffic differs from the teacher's by more
    than this share of it. ``cache``: where to keep what a teacher said that is another model (None: beside the
    output, until the end). ``log`` (a .csv or .json) and ``tensorboard`` (a folder) are written at every judgement.
    """

    teacher: str
    adapt: tuple[Adapt, ...] = ("experts-all",)
    losses: Losses = field(default_factory=Losses)
    schedule: Schedule = field(default_factory=Schedule)
    heldout_tokens: int = 16384
    changed: float | None = None
    cache: Path | None = None
    log: Path | None = None
    tensorboard: Path | None = None


def recover(
    source: str,
    spec: RecoverSpec,
    text: Text,
    running: Running,
    writing: Writing,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train ``source`` towards ``spec.teacher`` as ``spec`` says and write the best state.

    Trains on the calibration split (of the user's traces on the train split, the largest) and judges on
    the validation split. Where no state beats the start on held-out text, nothing is written
    (NothingToDo) unless ``writing`` allows a copy. A run that was killed goes on from its last judgement, in
    ``.NAME.recover`` beside the output, which goes away at the end.
    """
    subject, teacher = open_subject(source), open_subject(spec.teacher)
    refuse_output(writing.output, CONFIG_NAME, overwrite=writing.overwrite, sources=(subject.root, teacher.root))
    _refuse_spec(subject, teacher, spec, text, writing)
    placement = place(running.device, running.dtype, subject.stored_dtype)
    is_itself = shares_weights(subject, teacher)
    _refuse_too_large(subject, None if is_itself else teacher, spec, placement, running)
    length = window_length(subject, text)
    corpus = read_text(subject, text, builtin_split="calibration", own_split="train")
    heldout_text = text.even(max_tokens=spec.heldout_tokens, split="validation")
    heldout = read_text(subject, heldout_text, builtin_split="validation")
    if spec.losses.from_teacher and subject.fingerprint == teacher.fingerprint:
        raise UsageError(
            f"{source} is its own teacher, so there is nothing to learn; give the checkpoint before the surgery"
        )
    experts = experts_of_teacher(subject, teacher)
    if experts is None and (spec.losses.router or spec.changed is not None):
        raise UsageError(
            f"it is not known which of the {teacher.anatomy.experts} experts of {spec.teacher} the "
            f"{subject.anatomy.experts} of {source} were; leave out --router-distill and --changed"
        )
    report: dict[str, Any] = {
        "teacher": spec.teacher,
        "shares_weights": is_itself,
        "adapt": list(spec.adapt),
        "tokens": sum(corpus.tokens.values()),
        "heldout_tokens": sum(heldout.tokens.values()),
        "domains": dict(corpus.tokens),
        "splits": dict(corpus.splits),
        "placement": str(placement),
        "healed_before": healed_before(subject),
    }
    if writing.dry_run:
        return {**report, "source": source, "output": str(writing.output), "dry_run": True}
    training = Training(
        adapt=spec.adapt,
        losses=spec.losses,
        schedule=spec.schedule,
        changed=spec.changed,
        experts=experts,
        length=length,
    )
    facts = [asdict(training), teacher.fingerprint, str(placement), tokens_digest(corpus), tokens_digest(heldout)]
    store = Store(writing.output.absolute().with_name(f".{writing.output.name}.recover"), _digest(subject, facts))
    _refuse_existing(spec.log, store, writing)
    origin = {"teacher": teacher.fingerprint, "traces": corpus.hashes, "heldout_traces": heldout.hashes}
    with _kept_only_if_killed(store):
        said: Cached | Anatomy = teacher.anatomy
        if not is_itself:
            said = said_by(
                teacher,
                spec.cache or store.folder,
                corpus,
                heldout,
                spec.losses,
                experts,
                placement=placement,
                length=length,
                progress=progress,
            )
        # Eager experts gather by index, whose gradient one thread of a CPU adds up.
        with Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement, "grouped_mm") as opened:
            student = Stream(opened, Overlay(plan=identity(subject.anatomy)))
            log = Log(spec.log, spec.tensorboard)
            recovered = train(
                student, filled(opened), said, corpus, heldout, training, store=store, log=log, progress=progress
            )
            if recovered.tensors is None and not writing.allow_noop:
                raise NothingToDo(_why_nothing(recovered))
            gc.collect()
            plan = plan_recovered(student, recovered, spec, origin)
            written = finish(plan, subject, writing, progress)
    return {**report, **recovered.as_dict(), **written}


def plan_recovered(student: Stream, recovered: Recovered, spec: RecoverSpec, origin: Mapping[str, Any]) -> EditPlan:
    """Plan to replace what changed, in the dtypes that it is stored in, and nothing else.

    ``origin`` goes into the record: fingerprint of the teacher, hashes of the text.
    """
    student.overlay.tensors.update(recovered.tensors or {})
    record = {
        "operation": "recover",
        **origin,
        "adapt": list(spec.adapt),
        **({"changed": spec.changed} if spec.changed is not None else {}),
        "objective": asdict(spec.losses),
        "schedule": asdict(spec.schedule),
        "heldout_loss": {"before": recovered.closed["loss_before"], "after": recovered.closed["loss_after"]},
    }
    return plan_healed(student, record)


def _refuse_spec(subject: Subject, teacher: Subject, spec: RecoverSpec, text: Text, writing: Writing) -> None:
    """Raise now, from headers alone, what would be raised after the work."""
    check_adapt(spec.adapt)
    check_log(spec.log, spec.tensorboard)
    refuse_without_gradient(subject.anatomy, spec.losses, spec.adapt)
    if spec.changed is not None and "experts" not in parts_of(spec.adapt):
        raise UsageError("--changed chooses among experts, and none are trained; add --adapt experts")
    if writing.layout is not None:
        plan_layout(subject.anatomy, writing.layout)
    for layer in subject.anatomy.moe_layers if "routers" in parts_of(spec.adapt) else ():
        router = subject.anatomy.tensors[subject.anatomy.router_weight(layer)]
        if router.dtype not in WRITABLE:
            raise CheckpointError(
                f"{router.name} is stored as {router.dtype}; only {', '.join(WRITABLE)} can be trained: convert it"
            )
    if text.split in ("validation", "all"):
        raise UsageError(
            f"--split {text.split} would train on the text that judges the result; use train or calibration"
        )
    refuse_other_model(subject, teacher, spec.losses)


def _refuse_too_large(
    subject: Subject, teacher: Subject | None, spec: RecoverSpec, placement: Placement, running: Running
) -> None:
    """Raise UsageError where training would need what it cannot have. ``teacher``: where it is another model."""
    if placement.spread:
        raise UsageError("recover trains on one device; name it, as in --device cuda:0")
    needed = training_bytes(subject.anatomy, placement, spec.adapt, spec.losses, spec.schedule)
    if teacher is not None:  # before the student, not beside it
        needed = max(needed, count_parameters(teacher.anatomy).total * placement.dtype.itemsize)
    free = free_bytes(running.max_memory, placement.device)
    if needed > free:
        limit = "--max-memory leaves" if running.max_memory is not None else "the memory that is free leaves"
        raise UsageError(
            f"recover holds the checkpoint in memory and needs about {needed:,} bytes; {limit} {max(0, free):,}: "
            "lower --tokens-per-step, add --recompute, train fewer parts, or choose a smaller --dtype"
        )


def _why_nothing(recovered: Recovered) -> str:
    start = recovered.closed["loss_before"]
    nothing = f"recovery found nothing better than the start on held-out text (loss {start:.4f}); nothing was written"
    barred = [entry for entry in recovered.log if entry["heldout"] < start]
    if barred:  # only the floor keeps such a state from being the best
        best = min(entry["heldout"] for entry in barred)
        return (
            f"{nothing}: states down to {best:.4f} let experts fall below --min-share of their fair share; raise "
            "--balance, or let them with --min-share 0"
        )
    return f"{nothing}: try more steps, another learning rate or --allow-noop"


@contextmanager
def _kept_only_if_killed(store: Store) -> Iterator[None]:
    """Remove what ``store`` keeps once there is a result, or sure to be none; an interrupted run goes on from it."""
    try:
        yield
    except (UsageError, InputError):
        store.remove()
        raise
    store.remove()


def _refuse_existing(log: Path | None, store: Store, writing: Writing) -> None:
    if log is not None and log.exists() and not writing.overwrite and store.load() is None:
        raise UsageError(f"{log} exists; name another --log or add --overwrite")


def _digest(subject: Subject, facts: list[Any]) -> str:
    """Return a hash of the checkpoint as it was opened and of everything else that the result depends on."""
    states = {shard: header.state for shard, header in subject.checkpoint.headers.items()}
    said = json.dumps([moesurgeon.__version__, subject.fingerprint, states, facts], sort_keys=True, default=list)
    return hashlib.sha256(said.encode()).hexdigest()
