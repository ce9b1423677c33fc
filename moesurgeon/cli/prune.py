"""``moesurgeon prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesurgeon.cli import options
from moesurgeon.cli.curves import show_curves, show_reconstruction
from moesurgeon.cli.explained import show_explained, show_protection
from moesurgeon.cli.healed import heal_spec, show_choice, show_healing
from moesurgeon.cli.output import Report, answer, between, interval, table
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.cli.written import show_written
from moesurgeon.errors import UsageError
from moesurgeon.progress import Progress

NAME = "prune"


def command(
    source: options.Source,
    output: options.Output,
    profile: Annotated[Path | None, typer.Option(help="A profile of this checkpoint.", readable=False)] = None,
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
        Path | None,
        typer.Option(
            help='A JSON file {"LAYER": [expert, ...]} with the choice itself; --profile then says what traffic goes.',
            readable=False,
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="frequency, gate, ean, man, reap, traffic-reap, random, reconstruction (the layer's exact error; "
            "needs profile --inner) or healed (by what --heal leaves). Default: reap; of a top-1 checkpoint "
            "traffic-reap; with --below frequency."
        ),
    ] = None,
    protect: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=SHARE]",
            help="Keep the experts that carry this share of a domain's traffic (default: twice an even one), or are "
            "its best by REAP. NAME: a domain of the profile, long-context, first-choice or low-support. Repeat for "
            "more.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    virtual: Annotated[
        bool,
        typer.Option(
            "--virtual",
            help="Keep all tensors and put experts out of reach by their selection bias, in each layer as many as it "
            "can spare; saves no bytes.",
        ),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show of each expert that goes who used it and who is given its tokens now."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="For the random criterion.")] = 0,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="Also say what every count would cost each layer (needs profile --inner); with --dry-run no count "
            "has to be given.",
        ),
    ] = False,
    curve_plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the curves: .png, .svg or .pdf; needs matplotlib.", readable=False),
    ] = None,
    heal: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH[:COLUMN]",
            help="Heal the layers on this text before writing. Repeat for more; builtin:all for the builtin traces.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="COUNTS",
            help="Cut in steps, with a new profile, healing and a judgement each: 7,6 (experts that stay) or 25%:2 (a "
            "share in steps). Needs --heal.",
        ),
    ] = None,
    gate: Annotated[
        list[str],
        typer.Option(
            metavar="EXPR",
            help="What each step has to fulfil on validation text, as 'perplexity_ratio <= 1.05'; the last state that "
            "does is written, and the exit code is 4 if one does not. Repeat for more. Needs --heal.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    search: Annotated[
        bool, typer.Option("--search", help="Find the smallest count that passes the gate (not below --keep).")
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where steps are kept for a killed command to go on. Default: beside OUT, until it is written.",
            readable=False,
        ),
    ] = None,
    heal_method: options.HealMethod = "distill",
    heal_tokens: options.HealTokens = 98304,
    heal_budget: options.HealBudget = [],  # noqa: B006 - typer copies it
    heal_heldout: options.HealHeldout = 16384,
    validation: options.Validation = [],  # noqa: B006 - typer copies it
    heal_steps: options.HealSteps = 600,
    heal_router: options.HealRouter = False,
    heal_rank: options.HealRank = None,
    heal_teacher: options.HealTeacher = None,
    heal_sample: options.HealSample = None,
    merge: options.Merge = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_memory: options.MaxMemory = None,
    layout: options.Layout = None,
    vllm_config: options.VllmConfig = False,
    link: options.Link = False,
    shard_size: options.ShardSize = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    allow_noop: options.AllowNoop = False,
    json: options.Json = False,
) -> None:
    """Remove experts: the same number from every layer, chosen by what a profile measured."""

    def work(progress: Progress) -> Report:
        if explain and profile is None and keep_experts is not None:
            raise UsageError("--explain tells what a profile says of the dropped experts: give --profile")
        from moesurgeon.pipeline.options import Running, Writing
        from moesurgeon.pipeline.prune import prune
        from moesurgeon.pipeline.prune_spec import PruneSpec

        spec = PruneSpec(
            profile=profile,
            keep=keep,
            ratio=ratio,
            below=below,
            keep_experts=keep_experts,
            criterion=criterion,
            seed=seed,
            protect=tuple(protect),
            virtual=virtual,
            curve=curve,
            curve_plot=curve_plot,
            heal=heal_spec(
                heal,
                heal_method,
                tokens=heal_tokens,
                heldout=heal_heldout,
                steps=heal_steps,
                router=heal_router,
                rank=heal_rank,
                teacher=heal_teacher,
                sample=heal_sample,
                budget=heal_budget,
                validation=validation,
                merge=merge,
            ),
            stages=stages,
            gates=tuple(gate),
            search=search,
            run=run,
        )
        writing = Writing(
            output=output,
            layout=layout,
            vllm_config=vllm_config,
            link=link,
            shard_size=bytes_of(shard_size),
            overwrite=overwrite,
            dry_run=dry_run,
            allow_noop=allow_noop,
        )
        running = Running(device=device, dtype=dtype, max_memory=bytes_of(max_memory))
        return prune(source, spec, writing, progress, running)

    answer(json, work, lambda report: _show(report, explain))


def _show(report: Report, explain: bool) -> None:
    if "candidates" in report:
        _show_candidates(report["candidates"])
    show_curves(report)
    if report["criterion"] is None:  # nothing but the curve was asked for
        return
    if report["virtual"]:
        counts = sorted({len(experts) for experts in report["kept"].values()})
        many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        print(f"{many} of {report['experts_before']} experts per layer can be chosen, by {_criterion(report)}")
    else:
        after = str(report["experts_after"])
        if report["dry_run"] and any(stage["stage"].startswith("count-") for stage in report["stages"]):
            after = f"{report['stages'][0]['experts_after']} to {after}, as few as pass the gate,"
        print(f"{report['experts_before']} -> {after} experts per layer, by {_criterion(report)}")
    traffic = report.get("traffic_removed", {})
    for layer, experts in report["dropped"].items():
        had = f" ({traffic[layer]['share']:.0%} of its traffic)" if experts and layer in traffic else ""
        print(f"  layer {layer} loses {', '.join(map(str, experts)) or 'none'}{had}")
    show_protection(report)
    if explain:
        _explain(report)
    show_reconstruction(report)
    if report.get("stability"):
        found = report["stability"]
        enough = "" if found["tokens"] is None else f"; about {found['tokens']:,} tokens would settle the choice"
        print(
            f"  stability: half of the documents would change {found['changed']:.0%} of what goes, "
            f"{found['worst']:.0%} in layer {found['worst_layer']}{enough}"
        )
    show_choice(report)
    _show_stages(report["stages"])
    show_healing(report)
    show_written(report)


def _criterion(report: Report) -> str:
    """Return the criterion, and where it was not named why it was taken."""
    reason = report.get("criterion_reason")
    return f"{report['criterion']} ({reason})" if reason else str(report["criterion"])


def _explain(report: Report) -> None:
    """Print why each expert goes; in stages each in the numbering of what was left before it."""
    if "explained" in report:
        show_explained(report)
    for stage in report["stages"]:
        if "explained" in stage.get("evidence", {}):
            print(f"{stage['stage']}, in the numbering of the {stage['experts_before']} experts before it:")
            show_explained({**stage["evidence"], "criterion": stage["criterion"]})


def _show_stages(stages: list[dict[str, Any]]) -> None:
    """Print how each step was judged."""
    if not stages:
        return
    if "judged" not in stages[0]:
        print(f"  would be judged with {', '.join(str(stage['experts_after']) for stage in stages)} experts")
        return
    rows = []
    for stage in stages:
        ratio, loss = stage["judged"]["against"], stage["healed"]["heldout"]
        rows.append(
            [
                stage["stage"], f"{stage['experts_before']} -> {stage['experts_after']}", f"{loss['bare']:.4f}",
                f"{stage['judged']['loss']:.4f}", f"{ratio['perplexity_ratio']:.3f}", interval(ratio["interval"], 3),
                "accepted" if stage["accepted"] else "rolled back",
            ]
        )  # fmt: skip
    headings = ["step", "experts", "loss, bare", "loss", "perplexity ratio", "95 % interval", ""]
    table(headings, rows, "On validation text")


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
