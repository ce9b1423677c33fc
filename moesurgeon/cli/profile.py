"""``moesurgeon profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer, bar, table
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.cli.texts import text_of
from moesurgeon.progress import Progress

NAME = "profile"


def command(
    checkpoint: options.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write the profile to.", readable=False)],
    traces: options.Traces = ["builtin:all"],  # noqa: B006 - typer copies it
    split: options.SplitOption = None,
    max_tokens: options.MaxTokens = 65536,
    budget: options.Budget = [],  # noqa: B006 - typer copies it
    weight: options.Weight = [],  # noqa: B006 - typer copies it
    sample: options.Sample = None,
    length: options.Length = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_memory: options.MaxMemory = None,
    resume: Annotated[
        bool,
        typer.Option(help="Where layers are streamed: keep what a killed run needs to go on, beside the profile."),
    ] = True,
    inner: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Also run all experts on so many tokens and keep inner products of their outputs: what any subset "
            "or top-k costs follows from them. Size and time are said first.",
        ),
    ] = None,
    inner_experts: Annotated[
        int, typer.Option(min=1, metavar="M", help="With --inner: only each token's likeliest experts.")
    ] = 64,
    latency: Annotated[
        bool, typer.Option("--latency", help="Also time one expert by its number of tokens, and the blocks.")
    ] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Count which experts the traces use, how much they weigh and how large their outputs are.

    profile show, merge, diff and import work on what this writes; a checkpoint in a folder of such a name is ./show.
    """

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.options import Running
        from moesurgeon.pipeline.profile import ProfileOutput, profile

        text = text_of(
            traces, split=split, max_tokens=max_tokens, length=length, budget=budget, sample=sample, weight=weight
        )
        running = Running(device=device, dtype=dtype, max_memory=bytes_of(max_memory))
        wanted = ProfileOutput(
            output=output,
            overwrite=overwrite,
            resume=resume,
            inner=inner,
            inner_experts=inner_experts,
            latency=latency,
        )
        return profile(checkpoint, wanted, text, running, progress)

    answer(json, work, _show)


def _show(report: Report) -> None:
    domains = ", ".join(f"{domain} {count:,}" for domain, count in report["domains"].items())
    rows = []
    for layer, figures in report["layers"].items():
        shares = figures["utilization"]
        coldest = min(range(len(shares)), key=shares.__getitem__)
        rows.append(
            [layer, bar(shares), f"{figures['entropy']:.3f}", f"{figures['max_over_mean']:.2f}",
             f"{coldest} ({shares[coldest]:.1%})", str(len(figures["never_routed"]))]
        )  # fmt: skip
    table(
        ["layer", "utilization", "entropy", "max/mean", "coldest", "unused"],
        rows,
        f"{report['tokens']:,} tokens: {domains}",
    )
    for note in report["notes"]:
        print(f"note: {note}")
    print(f"wrote {report['path']}")
