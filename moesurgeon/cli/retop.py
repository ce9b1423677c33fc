"""``moesurgeon retop``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgeon.cli import options
from moesurgeon.cli.foreseen import show_foreseen
from moesurgeon.cli.healed import heal_spec, show_healing
from moesurgeon.cli.output import Report, amount, answer
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.cli.written import show_written
from moesurgeon.progress import Progress

NAME = "retop"


def command(
    source: options.Source,
    output: options.Output,
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token.")] = 1,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="A profile of this checkpoint: says beforehand where routing would collapse.", readable=False
        ),
    ] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="Say what every number of experts per token costs each layer, and which would rather keep more (needs "
            "a --profile with --inner).",
        ),
    ] = False,
    per_layer_average: Annotated[
        float | None,
        typer.Option(
            metavar="K",
            help="Divide so many experts per token on average among the layers, as 1.5, for the least error; the "
            "checkpoint itself gets --top-k everywhere.",
        ),
    ] = None,
    per_layer_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='Write that as JSON, {"top_k": {"LAYER": k}}, for runtimes that can.', readable=False
        ),
    ] = None,
    calibrate: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH[:COLUMN]",
            help="Heal the layers on this text before writing. Repeat for more; builtin:all for the builtin traces.",
        ),
    ] = [],  # noqa: B006 - typer copies it
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
    """Route every token to fewer experts: a config edit, the weights are copied or linked."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.foresight import Foresight
        from moesurgeon.pipeline.options import Running, Writing
        from moesurgeon.pipeline.retop import retop
        from moesurgeon.surgery.retop import RetopSpec

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
        healing = heal_spec(
            calibrate,
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
        )
        foresight = Foresight(profile=profile, per_layer=per_layer, average=per_layer_average, out=per_layer_out)
        return retop(
            source,
            RetopSpec(top_k=top_k),
            writing,
            progress,
            foresight=foresight,
            heal=healing,
            running=running,
        )

    answer(json, work, _show)


def _show(report: Report) -> None:
    flops = report["flops_per_token"]
    print(f"top-{report['top_k']['before']} -> top-{report['top_k']['after']}")
    print(f"  {report['output_scale']}")
    print(f"  FLOPs per token: {amount(flops['before'])} -> {amount(flops['after'])}")
    show_foreseen(report)
    show_healing(report)
    show_written(report)
