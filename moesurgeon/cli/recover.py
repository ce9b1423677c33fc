"""``moesurgeon recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moesurgeon.cli import options
from moesurgeon.cli.healed import heal_spec, show_healing
from moesurgeon.cli.output import Report, answer
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.cli.texts import text_of
from moesurgeon.cli.written import show_written
from moesurgeon.errors import UsageError
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
    adapt: Annotated[
        list[str],
        typer.Option(
            metavar="WHAT",
            help="What is trained: routers or experts (low-rank adapters on the routers, on the experts' down "
            "projections), full-routers (their weights), experts-all (adapters on all matrices of all experts, shared "
            "ones too). Repeat for more.",
        ),
    ] = ["experts-all"],  # noqa: B006 - typer copies it
    adapter: Annotated[
        Literal["lora", "adalora"],
        typer.Option(
            help="The routers' adapters: all of one rank, or ranks dealt out among the routers by what they bring."
        ),
    ] = "lora",
    changed: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="SHARE", help="Train only experts whose traffic is not the teacher's by more than this."
        ),
    ] = None,
    validation: options.Validation = [],  # noqa: B006 - typer copies it
    heal_method: Annotated[
        Literal["none", "scale", "ridge", "distill"],
        typer.Option(help="First repair every layer towards the teacher's, as `prune --heal` does, on the same text."),
    ] = "none",
    heal_tokens: options.HealTokens = 98304,
    heal_budget: options.HealBudget = [],  # noqa: B006 - typer copies it
    heal_heldout: options.HealHeldout = 16384,
    heal_steps: options.HealSteps = 600,
    heal_rank: options.HealRank = None,
    steps: Annotated[int, typer.Option(min=0, help="Optimiser steps at most; 0: heal the layers alone.")] = 1000,
    tokens_per_step: Annotated[int, typer.Option(min=8, help="Tokens of one step.")] = 2048,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, help="Peak learning rate; full-routers are trained at a tenth of it.")
    ] = 1e-3,
    expert_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Of what is trained of experts. Default: the same.")
    ] = None,
    rank: Annotated[
        int, typer.Option(min=1, help="Rank of every adapter (of each expert's); of adalora on average.")
    ] = 32,
    balance: Annotated[float, typer.Option(min=0.0, help="Coefficient of the load-balancing loss.")] = 0.01,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the distillation.")] = 1.0,
    lm: Annotated[float, typer.Option(min=0.0, help="Coefficient of the language-model loss beside distillation.")] = 0,
    router_distill: Annotated[
        float, typer.Option(min=0.0, help="Coefficient of distilling the routers' distributions over the experts.")
    ] = 0,
    hidden: Annotated[float, typer.Option(min=0.0, help="Coefficient of matching hidden states after each layer.")] = 0,
    z_loss: Annotated[float, typer.Option(min=0.0, help="Coefficient of the z-loss on the routers' logits.")] = 0,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Experts per token that get a gradient. Default: all.")
    ] = None,
    capacity: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="FACTOR", help="While training, drop what exceeds an expert's capacity."),
    ] = None,
    judge_every: Annotated[int, typer.Option(min=1, help="Steps between looks at held-out text.")] = 100,
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after so many looks without a better state. Default: at the end.")
    ] = None,
    min_share: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=0.99,
            metavar="SHARE",
            help="Keep no state in which an expert has surely fallen below this part of its fair share of held-out "
            "choices. 0: any.",
        ),
    ] = 0.25,
    warmup: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps in which rates rise.")] = 0.05,
    clip: Annotated[float, typer.Option(min=1e-6, help="Largest norm of the gradient.")] = 1.0,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Run layers again in the backward pass: slower, with less memory.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the adapters and of the order of the text.")] = 0,
    split: options.SplitOption = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=8,
            help="Tokens to choose from at most, for all traces without a --budget together; those that the steps "
            "reach are used.",
        ),
    ] = 524288,
    heldout_tokens: Annotated[int, typer.Option(min=64, help="Tokens of the validation split that judge.")] = 16384,
    budget: options.Budget = [],  # noqa: B006 - typer copies it
    sample: options.Sample = None,
    length: options.Length = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep what a teacher said that is another model, for runs to come. Default: no.",
            readable=False,
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write every look at held-out text to this .csv or .json.", readable=False),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write them for TensorBoard, too (needs the package).", readable=False),
    ] = None,
    save_adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write what is trained as an adapter for peft, too, which fits CKPT.", readable=False
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    streamed: Annotated[
        bool,
        typer.Option("--streamed", help="Read the layers at every step, as is done for what does not fit into memory."),
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory to use at most, as 16GB. Default: most of what is free."),
    ] = None,
    layout: options.Layout = None,
    vllm_config: options.VllmConfig = False,
    link: options.Link = False,
    shard_size: options.ShardSize = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    allow_noop: options.AllowNoop = False,
    json: options.Json = False,
) -> None:
    """Train experts and routers of an edited checkpoint towards what it was, end to end; layers first if asked."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.options import Running, Writing
        from moesurgeon.pipeline.recover import RecoverSpec, recover
        from moesurgeon.pipeline.recover_layers import recover_layers
        from moesurgeon.recovery.objective import Losses
        from moesurgeon.recovery.schedule import Schedule

        schedule = Schedule(
            steps=steps,
            tokens_per_step=tokens_per_step,
            learning_rate=learning_rate,
            expert_rate=expert_rate,
            rank=rank,
            judge_every=judge_every,
            patience=patience,
            min_share=min_share,
            warmup=warmup,
            clip=clip,
            candidates=candidates,
            capacity=capacity,
            recompute=recompute,
            seed=seed,
        )
        spec = RecoverSpec(
            teacher=teacher,
            validation=tuple(validation),
            adapt=tuple(adapt),  # type: ignore[arg-type]  # checked there
            adapter=adapter,
            losses=Losses(
                objective=objective,
                balance=balance,
                temperature=temperature,
                lm=lm,
                router=router_distill,
                hidden=hidden,
                z=z_loss,
            ),
            schedule=schedule,
            heldout_tokens=heldout_tokens,
            changed=changed,
            cache=cache,
            log=log,
            tensorboard=tensorboard,
            save_adapter=save_adapter,
            streamed=streamed,
        )
        text = text_of(traces, split=split, max_tokens=max_tokens, length=length, budget=budget, sample=sample)
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
        heal = heal_spec(
            list(traces), heal_method, tokens=heal_tokens, heldout=heal_heldout, steps=heal_steps, router=False,
            rank=heal_rank, teacher=teacher, budget=heal_budget,
        )  # fmt: skip
        if heal is None or heal.method == "none":
            if not steps:
                raise UsageError("--steps 0 trains nothing: give more of them, or --heal-method")
            return recover(source, spec, text, running, writing, progress)
        return recover_layers(source, spec, heal, text, running, writing, progress=progress)

    answer(json, work, _show)


def _show(report: Report) -> None:
    show_healing(report)
    if "steps" not in report and not report["dry_run"]:  # the layers alone
        show_written(report)
        return
    if report["dry_run"]:
        if "tokens" not in report:
            return
        print(f"would train on {report['tokens']:,} and judge on {report['heldout_tokens']:,} held-out tokens")
        return
    print(
        f"held-out loss {report['loss_before']:.4f} -> {report['loss_after']:.4f}, teacher {report['teacher_loss']:.4f}"
    )
    if report["gap_closed"] is not None:
        print(f"  {_share(report)} of the gap to the teacher closed in {report['steps']} steps")
        for domain, figures in report["domains_closed"].items():
            print(f"    {domain}: {_share(figures)}")
        for healed in report["healed_before"]:
            print(f"  healing before ({healed['method']}): {_percent(healed['gap_closed'])} of the gap of its cut")
        for part, figures in report["parts"].items():
            print(f"  {part} alone: {_percent(figures['gap_closed'])}, loss {figures['loss']:.4f}")
    for layer, rank in report["ranks"]["last"].items() if report["ranks"] else ():
        written = (report["ranks"]["written"] or {}).get(layer)
        print(f"  layer {layer}: rank {rank} for its router" + (f", {written} in what is written" if written else ""))
    if not report["resident"]:
        print(f"  layers were streamed: {report['bytes_read_per_step'] / 1e9:.2f} GB read at every step")
    for layer, now in report["usage"]["after"].items():
        before = report["usage"]["before"][layer]
        dead = f", {len(now['dead'])} dead" if now["dead"] else ""
        fallen = f", fallen below the floor: {', '.join(map(str, now['fallen']))}" if now["fallen"] else ""
        print(
            f"  layer {layer}: entropy of use {before['entropy']:.3f} -> {now['entropy']:.3f}, busiest "
            f"{now['max_over_mean']:.2f} x the mean, least used {now['least']:.2f} x, "
            f"{now['overflow']['1.25']:.1%} over a capacity of 1.25{dead}{fallen}"
        )
    show_written(report)
    if report["saved_adapter"]:
        print(f"  wrote the adapter for peft to {report['saved_adapter']}")


def _share(figures: Any) -> str:
    if figures["gap_closed"] is None:
        return "no gap"
    interval = figures["interval"]
    between = f" (95 %: {interval[0]:.1%} to {interval[1]:.1%})" if interval else " (the gap is not sure)"
    return f"{figures['gap_closed']:.1%}{between}"


def _percent(share: float | None) -> str:
    return "no gap" if share is None else f"{share:.1%}"
