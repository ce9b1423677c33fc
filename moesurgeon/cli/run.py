"""``moesurgeon run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, amount, answer, interval, size, table
from moesurgeon.progress import Progress

NAME = "run"


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML (see recipes/).", readable=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the run.", readable=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in that folder.")] = False,
    json: options.Json = False,
) -> None:
    """Carry out a whole operation and show what it cost."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.run import RunOutput, run

        return run(recipe, RunOutput(output=output, overwrite=overwrite), progress)

    answer(json, work, _show)


def _show(report: Report) -> None:
    stages = report["stages"]
    rows = [
        ["experts, top-k", *(f"{stage['experts']}, top-{stage['top_k']}" for stage in stages)],
        ["parameters", *(amount(stage["parameters"]["total"]) for stage in stages)],
        ["active parameters", *(amount(stage["parameters"]["active"]) for stage in stages)],
        ["active FLOPs per token", *(amount(stage["flops_per_token"]) for stage in stages)],
        ["size", *(size(stage["bytes"]) for stage in stages)],
        ["tokens/s", *(f"{stage['tokens_per_second']:,.0f}" for stage in stages)],
        ["utilization entropy", *(f"{stage['utilization_entropy']:.3f}" for stage in stages)],
        ["busiest expert / mean", *(f"{stage['max_over_mean']:.2f}" for stage in stages)],
        ["perplexity", *(f"{stage['perplexity']:.3f}" for stage in stages)],
        *([f"  {domain}", *(f"{stage['domains'][domain]:.3f}" for stage in stages)] for domain in stages[0]["domains"]),
        ["perplexity ratio", *(f"{stage['perplexity_ratio']:.3f}" for stage in stages)],
        ["  95 % interval", *(interval(stage["ratio_interval"], 3) for stage in stages)],
        *_bare(stages),
    ]
    table(["", *(stage["stage"] for stage in stages)], rows, "On held-out text (report split)")
    for stage in stages:
        if stage["gap_closed"] is not None:
            print(
                f"{stage['stage']} closed {stage['gap_closed']:.1%} of the loss gap to the original (validation split)"
            )
    if "rejected" in report:
        print(f"rejected: {report['rejected']} fails the gate; the last state that passes is {report['accepted']}")
    print(f"checkpoint: {report['checkpoint']}; figures: {report['output']}/figures.json ({report['seconds']:.0f} s)")


def _bare(stages: list[dict[str, Any]]) -> list[list[str]]:
    """Return rows of what the cuts cost before they were healed; none where nothing was."""
    if not any("bare" in stage for stage in stages):
        return []
    return [
        [heading, *(f"{stage['bare'][name]:.3f}" if "bare" in stage else "" for stage in stages)]
        for heading, name in (("bare cut: perplexity", "perplexity"), ("bare cut: ratio", "perplexity_ratio"))
    ]
