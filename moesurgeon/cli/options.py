"""Arguments and options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Source = Annotated[
    str, typer.Argument(metavar="CKPT", help="A checkpoint folder, builtin:NAME or hf://org/name[@revision].")
]
Profile = Annotated[Path, typer.Argument(metavar="PROFILE", help="The folder of a profile.", readable=False)]
Before = Annotated[Path, typer.Argument(metavar="BEFORE", help="The profile to compare with.", readable=False)]
After = Annotated[Path, typer.Argument(metavar="AFTER", help="The profile that may have changed.", readable=False)]
ProfileOutput = Annotated[
    Path, typer.Option("--output", "-o", help="The folder to write the profile to.", readable=False)
]
Output = Annotated[
    Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist or be empty.", readable=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output once the new one is complete.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]
AllowNoop = Annotated[bool, typer.Option("--allow-noop", help="Copy the checkpoint where nothing would change.")]
Link = Annotated[bool, typer.Option("--link", help="Hard-link shards that do not change instead of copying them.")]
ShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Bytes of a shard at most, as 5GB or 500MiB. Default: as the source is divided."),
]
Layout = Annotated[
    str | None,
    typer.Option(help="Store the result per-expert, fused, or (DeepSeek-MoE v1) as qwen2-moe. Default: as the source."),
]
VllmConfig = Annotated[
    bool,
    typer.Option(
        "--vllm-config",
        help="Also write the configuration_deepseek.py that vLLM needs to read DeepSeek-MoE v1 in its own names. vLLM "
        "runs it with --trust-remote-code; moesurgeon never does.",
    ),
]
Traces = Annotated[
    list[str],
    typer.Option(
        "--traces",
        "-t",
        metavar="[NAME=]PATH[:COLUMN]",
        help="Text by domain: jsonl(.gz), txt, parquet, a saved dataset, a folder of these, or builtin:NAME. "
        "'FOLDER/*', in quotes: a domain for each of its sub-folders and files. Repeat for more.",
    ),
]
SplitOption = Annotated[
    Literal["train", "calibration", "validation", "report", "all"] | None,
    typer.Option(
        help="Which part of the traces. Default: this command's of builtin traces; of yours all, or train to recover."
    ),
]
MaxTokens = Annotated[
    int, typer.Option(min=8, help="Tokens to read at most, for all traces without a --budget together.")
]
Budget = Annotated[
    list[str],
    typer.Option(metavar="NAME=TOKENS", help="Tokens to read of one trace at most, as code=200k. Repeat for more."),
]
Weight = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=NUMBER",
        help="What a token of one trace counts when experts are chosen by this profile, as chat=2. Repeat for more.",
    ),
]
Sample = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**63 - 1,
        metavar="SEED",
        help="Take a uniform sample of all documents, which reads every trace to its end, rather than the first ones.",
    ),
]
Length = Annotated[
    int | None,
    typer.Option(min=8, help="Tokens of a window. Default: 512, or the context if that is shorter."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16. Auto: float32 on a CPU, else as stored.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory to use at most, as 16GB: of the process, or of the device. What does not fit is read layer by "
        "layer. Default: most of what is free.",
    ),
]
HealMethod = Annotated[
    Literal["none", "scale", "ridge", "distill"],
    typer.Option(help="How layers are healed; distill begins with ridge. none: only measure."),
]
HealTokens = Annotated[int, typer.Option(min=8, help="Tokens to heal on, for all traces without a budget together.")]
HealBudget = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=TOKENS",
        help="Tokens of one trace to heal on, as code=50k; --heal-tokens is for the others. Repeat for more.",
    ),
]
HealHeldout = Annotated[int, typer.Option(min=8, help="Tokens of the validation split that judge what is healed.")]
Validation = Annotated[
    list[str],
    typer.Option(
        metavar="[NAME=]PATH[:COLUMN]",
        help="Text of its own to judge on. It and the text that heals are then read whole. Default: the validation "
        "split of the text that heals. Repeat for more.",
    ),
]
HealSteps = Annotated[int, typer.Option(min=1, help="Optimiser steps for each layer at most (distill).")]
HealRouter = Annotated[
    bool,
    typer.Option("--heal-router", help="Let the routers change too: fit after the refit, trained along by distill."),
]
HealRank = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="R",
        help="Refit in the span of the R leading directions of each expert's activations, for wide experts: memory "
        "grows with R rather than with the width. Default: in all of them.",
    ),
]
Merge = Annotated[
    bool,
    typer.Option(
        "--merge",
        help="Fold each dropped expert into the survivor most like it, in the layers where that heals better (--heal).",
    ),
]
HealSample = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**63 - 1,
        metavar="SEED",
        help="Heal on a uniform sample of all documents by this seed. Default: the first ones.",
    ),
]
HealTeacher = Annotated[
    str | None,
    typer.Option(metavar="CKPT", help="The checkpoint that healing comes back to. Default: the one that is cut."),
]
