"""``moesurgeon recover``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.cli.texts import text_of
from moesurgeon.cli.written import show_written
from moesurgeon.progress import Progress

NAME = "recover"


def command(
    source: options.Source,
    output: options.Output,
    teacher: Annotated[str, typer.Option(metavar="CKPT", help="The checkpoint before the surgery.")],
    traces: options.Traces = ["builtin:all"],  # noqa: B006 - typer copies it
    objective: Annotated[
        Literal["distill", "lm"],
        typer.Option(help="Distillation from the teacher, or the language-model loss."),
    ] = "distill",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 200,
    tokens_per_step: Annotated[int, typer.Option(min=8, help="Tokens of one step.")] = 4096,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 3e-3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters on the routers.")] = 4,
    balance: Annotated[float, typer.Option(min=0.0, help="Coefficient of the load-balancing loss.")] = 0.01,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the distillation.")] = 1.0,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Experts per token that get a gradient. Default: all.")
    ] = None,
    judge_every: Annotated[int, typer.Option(min=1, help="Steps between looks at held-out text.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the adapters and of the order of the text.")] = 0,
    split: options.SplitOption = None,
    max_tokens: options.MaxTokens = 65536,
    heldout_tokens: Annotated[int, typer.Option(min=64, help="Tokens of the validation split that judge.")] = 16384,
    budget: options.Budget = [],  # noqa: B006 - typer copies it
    sample: options.Sample = None,
    length: options.Length = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    layout: options.Layout = None,
    link: options.Link = False,
    shard_size: options.ShardSize = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    allow_noop: options.AllowNoop = False,
    json: options.Json = False,
) -> None:
    """Adapt the routers of an edited checkpoint to what is left (low-rank, distilled from the teacher)."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.options import Running, Writing
        from moesurgeon.pipeline.recover import RecoverSpec, recover
        from moesurgeon.recovery.objective import Losses
        from moesurgeon.recovery.train import Schedule

        schedule = Schedule(
            steps=steps,
            tokens_per_step=tokens_per_step,
            learning_rate=learning_rate,
            rank=rank,
            judge_every=judge_every,
            candidates=candidates,
            seed=seed,
        )
        spec = RecoverSpec(
            teacher=teacher,
            losses=Losses(objective=objective, balance=balance, temperature=temperature),
            schedule=schedule,
            heldout_tokens=heldout_tokens,
        )
        text = text_of(traces, split=split, max_tokens=max_tokens, length=length, budget=budget, sample=sample)
        writing = Writing(
            output=output,
            layout=layout,
            link=link,
            shard_size=bytes_of(shard_size),
            overwrite=overwrite,
            dry_run=dry_run,
            allow_noop=allow_noop,
        )
        return recover(source, spec, text, Running(device=device, dtype=dtype), writing, progress)

    answer(json, work, _show)


def _show(report: Report) -> None:
    if report["dry_run"]:
        print(f"would train on {report['tokens']:,} and judge on {report['heldout_tokens']:,} held-out tokens")
        return
    closed = report["gap_closed"]
    print(
        f"held-out loss {report['loss_before']:.4f} -> {report['loss_after']:.4f}, teacher {report['teacher_loss']:.4f}"
    )
    if closed is not None:
        print(f"  {closed:.1%} of the gap to the teacher closed; gradient at the routers {report['gradient_norm']:.1e}")
    show_written(report)
