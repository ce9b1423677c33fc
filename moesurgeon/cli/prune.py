"""``moesurgeon prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesurgeon.cli import options
from moesurgeon.cli.healed import heal_spec, show_healing
from moesurgeon.cli.output import Report, answer, between, table
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.cli.written import show_written
from moesurgeon.progress import Progress

NAME = "prune"


def command(
    source: options.Source,
    output: options.Output,
    profile: Annotated[Path | None, typer.Option(help="A profile of this checkpoint.")] = None,
    keep: Annotated[int | None, typer.Option(help="Experts that stay per layer.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of the experts to remove (rounded down).")] = None,
    below: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Remove as many as get under this share of the tokens in every layer, as 0.005; --dry-run lists them.",
        ),
    ] = None,
    keep_experts: Annotated[
        Path | None, typer.Option(help='A JSON file {"LAYER": [expert, ...]} with the choice itself.')
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="frequency, gate, ean, man, reap, traffic-reap or random. Default: reap; with --below frequency."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="For the random criterion.")] = 0,
    heal: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH[:COLUMN]",
            help="Heal the layers on this text before writing. Repeat for more; builtin:all for the builtin traces.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    heal_method: options.HealMethod = "distill",
    heal_tokens: options.HealTokens = 98304,
    heal_steps: options.HealSteps = 600,
    heal_router: options.HealRouter = False,
    heal_teacher: options.HealTeacher = None,
    merge: options.Merge = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_memory: options.MaxMemory = None,
    layout: options.Layout = None,
    link: options.Link = False,
    shard_size: options.ShardSize = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    allow_noop: options.AllowNoop = False,
    json: options.Json = False,
) -> None:
    """Remove experts: the same number from every layer, chosen by what a profile measured."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.choice import PruneSpec
        from moesurgeon.pipeline.options import Running, Writing
        from moesurgeon.pipeline.prune import prune

        spec = PruneSpec(
            profile=profile,
            keep=keep,
            ratio=ratio,
            below=below,
            keep_experts=keep_experts,
            criterion=criterion,
            seed=seed,
            heal=heal_spec(
                heal,
                heal_method,
                tokens=heal_tokens,
                steps=heal_steps,
                router=heal_router,
                teacher=heal_teacher,
                merge=merge,
            ),
        )
        writing = Writing(
            output=output,
            layout=layout,
            link=link,
            shard_size=bytes_of(shard_size),
            overwrite=overwrite,
            dry_run=dry_run,
            allow_noop=allow_noop,
        )
        running = Running(device=device, dtype=dtype, max_memory=bytes_of(max_memory))
        return prune(source, spec, writing, progress, running)

    answer(json, work, _show)


def _show(report: Report) -> None:
    if "candidates" in report:
        _show_candidates(report["candidates"])
    print(f"{report['experts_before']} -> {report['experts_after']} experts per layer, by {report['criterion']}")
    for layer, experts in report["dropped"].items():
        print(f"  layer {layer} loses {', '.join(map(str, experts)) or 'none'}")
    if report.get("stability"):
        found = report["stability"]
        enough = "" if found["tokens"] is None else f"; about {found['tokens']:,} tokens would settle the choice"
        print(
            f"  stability: half of the documents would change {found['changed']:.0%} of what goes, "
            f"{found['worst']:.0%} in layer {found['worst_layer']}{enough}"
        )
    show_healing(report)
    show_written(report)


def _show_candidates(found: dict[str, Any]) -> None:
    """Print who gets less than the rule's share, by layer, and whether criteria agree on them."""
    rows = [
        [layer if number == 0 else "", str(expert["expert"]), f"{expert['share']:.3%}", between(expert["interval"]),
         _verdict(expert), *(str(rank) for rank in expert["ranks"].values()),
         ", ".join(f"{niche['times']:.1f} x in {niche['where'] or niche['kind']}" for niche in expert["niches"])]
        for layer, experts in found["layers"].items()
        for number, expert in enumerate(experts)
    ]  # fmt: skip
    few = min(found["layers"], key=lambda layer: len(found["layers"][layer]))
    print(
        f"under {found['below']:g} of the tokens: {len(rows)} experts; every layer can lose {found['count']} "
        f"(layer {few} has {len(found['layers'][few])})"
    )
    if rows:
        ranks = list(next(experts for experts in found["layers"].values() if experts)[0]["ranks"])
        headings = ["layer", "expert", "share", "95 % interval", "under", *ranks, "niche"]
        table(headings, rows, "with the rank by which each criterion would drop it", left=("niche",))
    pairs = found.get("agreement")
    if pairs:
        table(
            ["criteria", "rank correlation", "same drops"],
            [[" and ".join(p["criteria"]), f"{p['rank_correlation']:.2f}", f"{p['overlap']:.0%}"] for p in pairs],
        )


def _verdict(expert: dict[str, Any]) -> str:
    if not expert["supported"]:
        return "hardly seen"
    return "surely" if expert["sure"] else "maybe"
