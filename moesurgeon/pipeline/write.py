"""The end of every operation that writes a checkpoint: layout, dry run, no-op, the one write."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgeon.checkpoint.auxiliary import auxiliary_files
from moesurgeon.checkpoint.replaceable import CHECKPOINT
from moesurgeon.checkpoint.staging import refuse_unusable
from moesurgeon.errors import NothingToDo, OutputError, UsageError
from moesurgeon.pipeline.options import HealSpec, Running, Writing
from moesurgeon.pipeline.subject import Subject, few
from moesurgeon.progress import Progress
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.expert_rules import refuse_renumbered
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.numbering import new_numbers
from moesurgeon.surgery.plan import EditPlan, compose
from moesurgeon.surgery.runtimes import plan_config_class, runtime_statements

if TYPE_CHECKING:  # imported where it is used: it needs torch
    from moesurgeon.pipeline.heal import Healer


def refuse_output(writing: Writing, *sources: Path) -> None:
    """Raise UsageError or OutputError now if the checkpoint could not be written later; never in a dry run."""
    if not writing.dry_run:
        refuse_unusable(writing.output, CHECKPOINT, overwrite=writing.overwrite, sources=sources)


def _occupied(writing: Writing, subject: Subject) -> str | None:
    """Return what the write that a dry run shows would refuse of its output; None if nothing."""
    try:
        refuse_output(replace(writing, dry_run=False), subject.root)
    except (UsageError, OutputError) as error:
        return str(error)
    return None


def finish(plan: EditPlan, subject: Subject, writing: Writing, progress: Progress) -> dict[str, Any]:
    """Write what ``plan`` makes of ``subject``, or report what would be written.

    Returns the part of a report that all writing operations share. Raises NothingToDo for a plan
    without effect unless ``writing`` allows it.
    """
    plan = _as_written(plan, subject, writing)
    if plan.changes_nothing and not writing.allow_noop:
        raise NothingToDo(f"nothing to do: the result would be {subject.name} itself; --allow-noop copies it anyway")
    numbers = new_numbers(plan.record, subject.anatomy.routed_layers, subject.anatomy.experts)
    if numbers is not None:
        refuse_renumbered(subject.anatomy, numbers, subject.root)
    if writing.dry_run:  # else asked by the writer
        plan.check(subject.checkpoint.tensors)
    report: dict[str, Any] = {
        "source": subject.name,
        "output": str(writing.output),
        "dry_run": writing.dry_run,
        "bytes_before": subject.checkpoint.nbytes,
        "bytes_after": plan.nbytes,
        "plan": plan.summary(),
        "left_out": list(subject.beside.left_out),
        "runtimes": runtime_statements(plan.result(subject.anatomy), {*_files(subject), *plan.files}),
    }
    for warning in subject.warnings:  # copied as they are
        progress.note(f"note: {warning}")
    if subject.beside.left_out:
        progress.note(f"note: the output does not carry along {few(subject.beside.left_out)}")
    if writing.dry_run:
        if refused := _occupied(writing, subject):
            report["output_refused"] = refused
    else:
        written = apply(
            plan,
            subject.checkpoint,
            writing.output,
            link=writing.link,
            overwrite=writing.overwrite,
            shard_size=writing.shard_size,
            progress=progress,
        )
        report |= {"shards": written.shards, "linked_shards": written.linked, "resumed_shards": written.resumed}
    return report


def _as_written(plan: EditPlan, subject: Subject, writing: Writing) -> EditPlan:
    """Return ``plan`` with what ``writing`` says about the form of its result."""
    if writing.layout is not None:
        plan = compose(plan, plan_layout(plan.result(subject.anatomy), writing.layout))
    if writing.vllm_config:
        plan = compose(plan, plan_config_class(plan.result(subject.anatomy), _files(subject)))
    return plan


def _files(subject: Subject) -> set[str]:
    return {path.name for path in auxiliary_files(subject.root)}


def refuse_full(target: Path, needed: int) -> None:
    """Raise OutputError now, before the work, if the disk of ``target`` has not ``needed`` bytes."""
    folder = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"what is to be written takes {needed:,} bytes, and {folder} has {free:,} free; free space or choose "
            "another disk"
        )


def refuse_layout(plan: EditPlan, subject: Subject, writing: Writing) -> None:
    """Raise now, before the work, what storing the result of ``plan`` as ``writing`` says would raise."""
    _as_written(plan, subject, writing)


def finish_healed(
    plan: EditPlan,
    subject: Subject,
    heal: HealSpec | None,
    running: Running,
    writing: Writing,
    progress: Progress,
    *,
    opened: Healer | None = None,
) -> dict[str, Any]:
    """Do what :func:`finish` does, after healing if ``heal`` says how; a dry run says what would heal, and does not.

    ``healing`` of the report is by layer, ``healed`` says what the whole came to. ``opened``: what heals, if it is
    open already.
    """
    if heal is None or plan.changes_nothing:
        return {"healing": [], **finish(plan, subject, writing, progress)}
    from moesurgeon.pipeline.heal import check_heal, healed  # needs the running model, which nothing else here does
    from moesurgeon.pipeline.healing_text import planned

    check_heal(heal)
    if heal.merge and plan.result(subject.anatomy).experts == subject.anatomy.experts:
        raise UsageError("merging folds experts that are pruned into those that stay, and none is pruned: leave it out")
    refuse_layout(plan, subject, writing)
    if writing.dry_run:
        return {"healing": [], "healed": planned(subject, heal, progress), **finish(plan, subject, writing, progress)}
    refuse_full(writing.output, 0 if writing.link else plan.nbytes)
    with healed(plan, subject, heal, running, progress, opened) as (better, report):
        layers = report.pop("layers")
        return {"healing": layers, "healed": report, **finish(better, subject, writing, progress)}
