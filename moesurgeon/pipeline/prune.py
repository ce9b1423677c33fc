"""``prune``: choose the experts that stay, and write the checkpoint without the others."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moesurgeon.checkpoint.open import CONFIG_NAME
from moesurgeon.errors import InputError, NothingToDo, UsageError
from moesurgeon.pipeline.choice import Choice, PruneSpec, choose
from moesurgeon.pipeline.options import Running, Writing
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.write import finish_healed, refuse_layout, refuse_output
from moesurgeon.progress import SILENT, Progress
from moesurgeon.runtime.parallel import parallel_warnings
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import Kept, plan_prune, with_mtp_layers

if TYPE_CHECKING:  # imported where it is used: it needs torch
    from moesurgeon.pipeline.heal import Healer


def prune(
    source: str,
    spec: PruneSpec,
    writing: Writing,
    progress: Progress = SILENT,
    running: Running | None = None,
) -> dict[str, Any]:
    """Write ``source`` without the experts that ``spec`` does not keep, healed if it says how."""
    subject = open_subject(source)
    anatomy = subject.anatomy
    refuse_output(writing.output, CONFIG_NAME, overwrite=writing.overwrite, sources=(subject.root,))
    choice = choose(subject, spec, dry_run=writing.dry_run)
    running = running or Running()
    with ExitStack() as stack:
        opened = None
        if choice.unsettled is not None:
            assert spec.heal is not None
            # Needs the running model, which nothing else here does.
            from moesurgeon.pipeline.heal import healer
            from moesurgeon.pipeline.healed_choice import settled

            like = plan_prune(anatomy, with_mtp_layers(anatomy, choice.kept))
            refuse_layout(like, subject, writing)
            opened = stack.enter_context(healer(subject, spec.heal, running, progress, like=like, choosing=True))
            choice = settled(choice, opened)
        return _carry_out(subject, spec, choice, writing, running, progress, opened=opened)


def _carry_out(
    subject: Subject,
    spec: PruneSpec,
    choice: Choice,
    writing: Writing,
    running: Running,
    progress: Progress,
    *,
    opened: Healer | None,
) -> dict[str, Any]:
    """Plan what ``choice`` says, heal it, write it, and report."""
    anatomy = subject.anatomy
    kept, how = with_mtp_layers(anatomy, choice.kept), choice.record
    if spec.below is not None and writing.dry_run:
        writing = replace(writing, allow_noop=True)  # asked for what is cold, that nothing is cold is an answer
    try:
        plan = plan_prune(anatomy, kept)
    except UsageError as error:
        if spec.keep_experts is None:
            raise
        raise InputError(f"{spec.keep_experts}: {error}") from error
    if plan.changes_nothing and not writing.allow_noop:
        raise NothingToDo(f"nothing to prune: all {anatomy.experts} experts of every layer would stay; keep fewer")
    if plan.record:
        plan = EditPlan(plan.outputs, plan.dropped, plan.config, [{**plan.record[0], **how}])
    after = plan.result(anatomy).experts
    report = {
        "kept": {str(layer): list(kept[layer]) for layer in sorted(kept)},
        "dropped": {
            str(layer): [expert for expert in range(anatomy.experts) if expert not in kept[layer]]
            for layer in sorted(kept)
        },
        "experts_before": anatomy.experts,
        "experts_after": after,
        "warnings": [
            *choice.warnings,
            *_unmeasured(anatomy, choice.kept, after),
            *parallel_warnings(anatomy.experts, after),
        ],
        "stages": [],
        **choice.evidence,
        **how,
        **finish_healed(plan, subject, spec.heal, running, writing, progress, opened=opened),
    }
    for warning in report["warnings"]:
        progress.note(f"note: {warning}")
    return report


def _unmeasured(anatomy: Anatomy, chosen: Kept, after: int) -> list[str]:
    """Say what was decided without being measured."""
    warnings = []
    followers = [layer for layer in anatomy.mtp_layers if layer not in chosen]
    if followers and after < anatomy.experts:
        warnings.append(
            f"{_layers(followers)} (multi-token prediction) as layer {max(anatomy.moe_layers)}: nothing was measured "
            "there, since transformers does not run them; --keep-experts can name other experts"
        )
    by_table = sorted({role.layer for _name, role in anatomy.of_kind("table") if role.layer is not None})
    if by_table and after < anatomy.experts:
        share = (anatomy.experts - after) / anatomy.experts
        warnings.append(
            f"{_layers(by_table)} by a table from token to experts: the entries of pruned experts (about {share:.0%}) "
            f"are given evenly to those that stay; the cost cannot be measured, moesurgeon does not run "
            f"{anatomy.family.title}"
        )
    return warnings


def _layers(numbers: list[int]) -> str:
    """Return a subject and its verb.

    >>> _layers([4]), _layers([0, 1])
    ('layer 4 chooses', 'layers 0, 1 choose')
    """
    return f"layer {numbers[0]} chooses" if len(numbers) == 1 else f"layers {', '.join(map(str, numbers))} choose"
