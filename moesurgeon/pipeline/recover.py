"""``recover``: train the routers, and if asked the experts, of an edited checkpoint towards what it was."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import moesurgeon
from moesurgeon.checkpoint.places import refuse_within
from moesurgeon.engine.device import place
from moesurgeon.engine.ranks import join_ranks
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.whole import filled
from moesurgeon.errors import InputError, NothingToDo, UsageError
from moesurgeon.healing.planned import plan_healed
from moesurgeon.pipeline.healing_text import recovery_text, say_amounts
from moesurgeon.pipeline.known_text import record_of, refuse_known_validation
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.provenance import refuse_stale_record
from moesurgeon.pipeline.recover_adapter import beside, refuse_adapter
from moesurgeon.pipeline.recover_check import check_training
from moesurgeon.pipeline.recover_streamed import share_training, streaming
from moesurgeon.pipeline.recover_teacher import (
    experts_of_teacher,
    healed_before,
    refuse_other_model,
    said_by,
    shares_weights,
    tokens_digest,
)
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.text import window_length
from moesurgeon.pipeline.tokenizers import refuse_other_tokenizer
from moesurgeon.pipeline.write import finish, refuse_full, refuse_layout, refuse_output
from moesurgeon.progress import SILENT, Progress
from moesurgeon.recovery.log import Log
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.result import Recovered, Training
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.state import Store
from moesurgeon.recovery.streamed import bytes_per_step
from moesurgeon.recovery.targets import Adapt, Kind
from moesurgeon.recovery.teacher_cache import Cached
from moesurgeon.recovery.train import train
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan, identity

PATIENCE = timedelta(days=1)
"""How long processes wait for one another: a teacher says all that it has to say while the others wait."""


@dataclass(frozen=True, kw_only=True)
class RecoverSpec:
    """``teacher``: the unedited checkpoint. ``heldout_tokens`` bounds the text that judges, which is of the traces
    ``validation`` if there are any.

    ``adapt``: what is trained, routers through an ``adapter`` of this kind; ``changed``: of experts only those whose
    traffic differs from the teacher's by more than this share of it. ``cache``: where to keep what a teacher said
    that is another model (None: beside the output, until the end). ``log`` (a .csv or .json) and ``tensorboard`` (a
    folder) are written at every judgement. ``save_adapter``: a folder for what is trained as peft has it.
    ``streamed``: read the layers at every step even where all would fit into memory.
    """

    teacher: str
    validation: tuple[str, ...] = ()
    adapt: tuple[Adapt, ...] = ("experts-all",)
    adapter: Kind = "lora"
    losses: Losses = field(default_factory=Losses)
    schedule: Schedule = field(default_factory=Schedule)
    heldout_tokens: int = 16384
    changed: float | None = None
    cache: Path | None = None
    log: Path | None = None
    tensorboard: Path | None = None
    save_adapter: Path | None = None
    streamed: bool = False


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
    ``.NAME.recover`` beside the output, which goes away at the end. Of several processes each trains on rows
    of every batch; the first writes.
    """
    subject, teacher = open_subject(source), open_subject(spec.teacher)
    refuse_stale_record(subject)
    refuse_output(writing, subject.root, teacher.root)
    refuse_other_tokenizer(subject, teacher, progress)
    refuse_spec(subject, teacher, spec, text, writing)
    refuse_adapter(spec.save_adapter, spec.adapt, writing, (subject.root, teacher.root))
    placement = place(running.device, running.dtype, subject.stored_dtype)
    is_itself = _is_itself(subject, teacher, spec, progress)
    ranks = join_ranks(running.device, PATIENCE)
    length = window_length(subject, text)
    pool, heldout = recovery_text(subject, text, spec.validation, spec.heldout_tokens, progress)
    corpus = spec.schedule.needed(pool, length)
    refuse_known_validation(subject, heldout)
    experts = _experts(subject, teacher, spec)
    training = Training(
        adapt=spec.adapt,
        adapter=spec.adapter,
        losses=spec.losses,
        schedule=spec.schedule,
        changed=spec.changed,
        experts=experts,
        length=length,
    )
    # Eager experts gather by index, whose gradient one thread of a CPU adds up.
    opened = Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement, "grouped_mm")
    # Before the teacher speaks: it may be refused.
    memory, streamed = share_training(opened, training, heldout, running, ranks, streamed=spec.streamed)
    report: dict[str, Any] = {
        "teacher": spec.teacher,
        "shares_weights": is_itself,
        "adapt": list(spec.adapt),
        "adapter": spec.adapter,
        "tokens": sum(corpus.tokens.values()),
        "heldout_tokens": sum(heldout.tokens.values()),
        "domains": dict(corpus.tokens),
        "splits": dict(corpus.splits),
        "text": say_amounts(corpus, heldout, progress if ranks.is_first else SILENT),
        "placement": str(placement),
        "resident": not streamed,
        "bytes_read_per_step": bytes_per_step(opened) if streamed else 0,
        "memory": memory.as_dict(),
        "healed_before": healed_before(subject),
    }
    if writing.dry_run:
        return {**report, "source": source, "output": str(writing.output), "dry_run": True}
    refuse_full(writing.output, 0 if writing.link else subject.checkpoint.nbytes)
    if memory.note and ranks.is_first:
        progress.note(memory.note)
    texts = [tokens_digest(corpus), tokens_digest(heldout)]
    facts = [asdict(training), streamed, teacher.fingerprint, str(placement), *texts, ranks.size]
    facts += [memory.scratch.tokens, memory.scratch.positions]  # to rounding it depends on these
    kept = writing.output.absolute().with_name(f".{writing.output.name}.recover")
    store = Store(kept, digest_of(subject, facts), ranks)
    own_folder = store.folder if ranks.is_first else store.folder / str(ranks.number)  # each has files of its own
    _refuse_log(spec.log, store, writing, subject)
    origin = {
        "teacher": teacher.fingerprint,
        "traces": corpus.hashes,
        "heldout_traces": heldout.hashes,
        "documents": record_of(corpus, heldout),
    }
    with _kept_only_if_killed(store), ExitStack() as stack:
        stack.enter_context(opened)
        layers = stack.enter_context(streaming(memory, own_folder)) if streamed else None
        said: Cached | Anatomy = teacher.anatomy
        if not is_itself:
            said = said_by(
                teacher,
                spec.cache or store.folder,
                corpus,
                heldout,
                spec.losses,
                experts,
                pool=pool,
                placement=placement,
                length=length,
                ranks=ranks,
                max_memory=running.max_memory,
                streamed=spec.streamed,
                progress=progress,
            )
        student = Stream(opened, Overlay(plan=identity(subject.anatomy)))
        log = Log(spec.log, spec.tensorboard) if ranks.is_first else None
        recovered = train(
            student, layers or filled(opened), said, corpus, heldout, training,
            ranks=ranks, store=store, log=log, progress=progress,
        )  # fmt: skip
        if recovered.tensors is None and not writing.allow_noop:
            raise NothingToDo(_why_nothing(recovered))
        gc.collect()
        written: dict[str, Any] = {}
        if ranks.is_first:
            plan = plan_recovered(student, recovered, spec, origin)
            with beside(spec.save_adapter, recovered.adapter, source, writing):
                written = finish(plan, subject, writing, progress)
        ranks.least(1)  # it is written
    saved = str(spec.save_adapter) if spec.save_adapter and recovered.adapter else None
    return {**report, **recovered.as_dict(), **written, "saved_adapter": saved}


def _experts(subject: Subject, teacher: Subject, spec: RecoverSpec) -> dict[int, Sequence[int]] | None:
    """Return what ``experts_of_teacher`` does; UsageError for a teacher that has nothing to teach, or not this."""
    if spec.losses.from_teacher and subject.fingerprint == teacher.fingerprint:
        raise UsageError(
            f"{subject.name} is its own teacher, so there is nothing to learn; give the checkpoint before the surgery"
        )
    experts = experts_of_teacher(subject, teacher)
    if experts is None and (spec.losses.router or spec.changed is not None):
        raise UsageError(
            f"it is not known which of the {teacher.anatomy.experts} experts of {spec.teacher} the "
            f"{subject.anatomy.experts} of {subject.name} were; leave out --router-distill and --changed"
        )
    return experts


def plan_recovered(student: Stream, recovered: Recovered, spec: RecoverSpec, origin: Mapping[str, Any]) -> EditPlan:
    """Plan to replace what changed, in the dtypes that it is stored in, and nothing else.

    ``origin`` goes into the record: fingerprint of the teacher, hashes of the text.
    """
    student.overlay.tensors.update(recovered.tensors or {})
    record = {
        "operation": "recover",
        **origin,
        "adapt": list(spec.adapt),
        **({"adapter": spec.adapter} if spec.adapter != "lora" else {}),
        **({"changed": spec.changed} if spec.changed is not None else {}),
        "objective": asdict(spec.losses),
        "schedule": asdict(spec.schedule),
        "heldout_loss": {"before": recovered.closed["loss_before"], "after": recovered.closed["loss_after"]},
    }
    return plan_healed(student, record)


def refuse_spec(subject: Subject, teacher: Subject, spec: RecoverSpec, text: Text, writing: Writing) -> None:
    """Raise now, from headers alone, what would be raised after the work."""
    check_training(subject.anatomy, spec, text)
    refuse_layout(identity(subject.anatomy), subject, writing)
    refuse_other_model(subject, teacher, spec.losses)


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


def _is_itself(subject: Subject, teacher: Subject, spec: RecoverSpec, progress: Progress) -> bool:
    """Tell whether teacher and student have the same weights; a cache is not needed then, and that is said."""
    is_itself = shares_weights(subject, teacher)
    if is_itself and spec.cache is not None:
        progress.note(f"note: nothing is kept in --cache {spec.cache}: teacher and student have the same weights")
    return is_itself


def _refuse_log(log: Path | None, store: Store, writing: Writing, subject: Subject) -> None:
    if log is not None:
        refuse_within(log, "--log", writing.output, subject.root)
    if log is not None and log.exists() and not writing.overwrite and store.read() is None:
        raise UsageError(f"{log} exists; name another --log or add --overwrite")


def digest_of(subject: Subject, facts: list[Any]) -> str:
    """Return a hash of the checkpoint as it was opened and of everything else that the result depends on."""
    states = {shard: header.state for shard, header in subject.checkpoint.headers.items()}
    said = json.dumps([moesurgeon.__version__, subject.fingerprint, states, facts], sort_keys=True, default=list)
    return hashlib.sha256(said.encode()).hexdigest()
