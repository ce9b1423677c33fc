"""``moesurgeon profile diff``."""

from __future__ import annotations

from typing import Annotated

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer, table
from moesurgeon.progress import Progress

NAME = "profile diff"

_SHOWN = 16  # experts whose traffic changed most; --json has all


def command(
    before: options.Before,
    after: options.After,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="The pruned checkpoint that AFTER is of: its record tells who is who."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare two profiles: whose traffic changed, and whether by more than chance."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.profile_diff import diff

        return diff(before, after, checkpoint)

    answer(json, work, _show)


def _show(report: Report) -> None:
    names = list(next(iter(report["layers"].values()))["domains"])
    rows = [
        [layer, *(f"{before:.3f} -> {after:.3f}" for before, after in (figures["entropy"], figures["max_over_mean"])),
         f"{figures['total_variation']:.1%}", *(f"{figures['domains'][name]:.1%}" for name in names),
         str(sum(expert["significant"] for expert in figures["experts"]))]
        for layer, figures in report["layers"].items()
    ]  # fmt: skip
    before, after = report["experts"]
    title = f"{report['before']} -> {report['after']}: {before} -> {after} experts; what moved, of all and by domain"
    table(["layer", "entropy", "max/mean", "moved", *names, "significant"], rows, title)
    everyone = [(layer, expert) for layer, figures in report["layers"].items() for expert in figures["experts"]]
    stayed = [pair for pair in everyone if pair[1]["after"] is not None]
    changed = sorted(stayed, key=lambda pair: -abs(pair[1]["change"]))
    rows = [
        [layer, str(expert["expert"]), str(expert["after"]),
         f"{expert['share'][0]:.3%} -> {expert['share'][1]:.3%}", f"{expert['change']:+.3%}",
         "?" if expert["error"] is None else f"{expert['error']:.3%}", "yes" if expert["significant"] else ""]
        for layer, expert in changed[:_SHOWN]
    ]  # fmt: skip
    table(
        ["layer", "expert", "now", "share", "change", "error", "significant"],
        rows,
        "experts whose traffic changed most",
    )
    gone = [expert["share"][0] for _layer, expert in everyone if expert["after"] is None]
    if gone:
        print(f"{len(gone)} experts were dropped; they had {sum(gone) / len(report['layers']):.1%} of the traffic")
    print(f"{report['significant']} of {report['compared']} experts that stayed changed by more than chance")
