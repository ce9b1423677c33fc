"""``prune``: choose the experts that stay, and write the checkpoint without the others."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moesurgeon.checkpoint.places import refuse_within
from moesurgeon.checkpoint.whole_file import refuse_file
from moesurgeon.errors import NothingToDo
from moesurgeon.pipeline.choice import Choice, choice_of_file, choose, plan_chosen
from moesurgeon.pipeline.known_text import counted
from moesurgeon.pipeline.options import Running, Writing
from moesurgeon.pipeline.provenance import refuse_stale_record
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.write import finish_healed, refuse_layout, refuse_output
from moesurgeon.progress import SILENT, Progress
from moesurgeon.runtime.parallel import parallel_warnings
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.counts import unknown_counts
from moesurgeon.surgery.expert_rules import refuse_renumbered, refuse_told_apart
from moesurgeon.surgery.plan import identity
from moesurgeon.surgery.prune import with_mtp_layers

_VIRTUAL = (
    "pruned virtually: no byte is saved, all experts are still stored and loaded; nobody is given to those that go"
)

if TYPE_CHECKING:  # imported where it is used: it needs torch
    from moesurgeon.pipeline.heal import Healer


def prune(
    source: str,
    spec: PruneSpec,
    writing: Writing,
    progress: Progress = SILENT,
    running: Running | None = None,
) -> dict[str, Any]:
    """Write ``source`` without the experts that ``spec`` does not keep (virtually: out of reach).

    Healed, and judged in stages, if ``spec`` says so.
    """
    if spec.curve_plot is not None:  # drawn in a dry run, too
        refuse_file(spec.curve_plot, "--curve-plot", overwrite=writing.overwrite)
    subject = open_subject(source)
    refuse_stale_record(subject)
    if spec.curve_plot is not None:
        read = () if spec.profile is None else (spec.profile,)
        refuse_within(spec.curve_plot, "--curve-plot", writing.output, subject.root, *read)
    anatomy = subject.anatomy
    refuse_layout(identity(anatomy), subject, writing)  # before the choice
    _refuse_rules(subject, spec)
    if spec.is_staged:
        from moesurgeon.pipeline.stages import prune_in_stages  # runs the model

        report = prune_in_stages(subject, spec, writing, progress, running or Running())
        named = spec.keep_experts is not None
        said = [] if writing.dry_run else list(report["warnings"])  # each stage noted its own
    else:
        report, named, said = _at_once(subject, spec, writing, progress, running or Running())
    after = report["experts_after"]
    report["warnings"] += [*_unmeasured(anatomy, after, named=named), *parallel_warnings(anatomy.experts, after)]
    report["warnings"] += [*subject.odd_routers, *([] if spec.virtual else unknown_counts(anatomy))]
    for warning in report["warnings"]:
        if warning not in said:
            progress.note(f"note: {warning}")
    return report


def _refuse_rules(subject: Subject, spec: PruneSpec) -> None:
    """Refuse now what would be refused after the work: rules that name experts by number, where they get others."""
    if spec.virtual or (spec.keep_experts is None and spec.heal is None):
        return  # nothing is renumbered, or there is no work before the choice
    if spec.keep_experts is None:
        refuse_told_apart(subject.anatomy, subject.root)
        return
    kept = with_mtp_layers(subject.anatomy, choice_of_file(spec, spec.keep_experts).kept)
    numbers = {layer: {old: new for new, old in enumerate(experts)} for layer, experts in kept.items()}
    refuse_renumbered(subject.anatomy, numbers, subject.root)


def _at_once(
    subject: Subject, spec: PruneSpec, writing: Writing, progress: Progress, running: Running
) -> tuple[dict[str, Any], bool, list[str]]:
    """Return the report, whether the choice names layers for multi-token prediction as well, and what was noted."""
    anatomy = subject.anatomy
    refuse_output(writing, subject.root)
    choice = choose(subject, spec, progress, dry_run=writing.dry_run)
    with ExitStack() as stack:
        opened = None
        if choice.unsettled is not None:
            assert spec.heal is not None
            # Needs the running model, which nothing else here does.
            from moesurgeon.pipeline.heal import healer
            from moesurgeon.pipeline.healed_choice import settled

            like = plan_chosen(anatomy, choice, spec)
            refuse_layout(like, subject, writing)
            opened = stack.enter_context(healer(subject, spec.heal, running, progress, like=like, choosing=True))
            choice = settled(choice, opened, anatomy)
        report, named = _carry_out(subject, spec, choice, writing, running, progress, opened=opened)
        return report, named, choice.warnings


def _carry_out(
    subject: Subject,
    spec: PruneSpec,
    choice: Choice,
    writing: Writing,
    running: Running,
    progress: Progress,
    *,
    opened: Healer | None,
) -> tuple[dict[str, Any], bool]:
    """Plan what ``choice`` says, heal it, write it, and report."""
    anatomy = subject.anatomy
    how = choice.record
    kept = {layer: tuple(sorted(choice.kept[layer])) for layer in sorted(choice.kept)}
    kept = kept if spec.virtual else with_mtp_layers(anatomy, kept)
    if (spec.below is not None or how["criterion"] is None) and writing.dry_run:
        # Asked for what is cold, that nothing is cold is an answer; or nothing but the curve was asked for.
        writing = replace(writing, allow_noop=True)
    plan = plan_chosen(anatomy, choice, spec)
    if plan.changes_nothing and not writing.allow_noop:
        raise NothingToDo(f"nothing to prune: all {anatomy.experts} experts of every layer would stay; keep fewer")
    for warning in choice.warnings:  # before what takes time, so that it can be stopped
        progress.note(f"note: {warning}")
    report = {
        "kept": {str(layer): list(kept[layer]) for layer in sorted(kept)},
        "dropped": {
            str(layer): [expert for expert in range(anatomy.experts) if expert not in kept[layer]]
            for layer in sorted(kept)
        },
        "experts_before": anatomy.experts,
        "experts_after": plan.result(anatomy).experts,
        "virtual": spec.virtual,
        "warnings": [*choice.warnings, *([_VIRTUAL] if spec.virtual and not plan.changes_nothing else [])],
        "stages": [],
        **choice.evidence,
        **counted(how),
        **finish_healed(plan, subject, spec.heal, running, writing, progress, opened=opened),
    }
    return report, set(anatomy.mtp_layers) <= set(choice.kept)


def _unmeasured(anatomy: Anatomy, after: int, *, named: bool) -> list[str]:
    """Say what was decided without being measured; ``named``: by a file for layers of multi-token prediction, too."""
    warnings = []
    followers = [] if named else list(anatomy.mtp_layers)
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
