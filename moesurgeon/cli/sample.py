"""``moesurgeon sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.progress import Progress

NAME = "sample"


def command(
    checkpoint: options.Source,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The .jsonl to write.", readable=False)
    ],
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of all texts together.")] = 32768,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a text at most.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Texts drawn at a time.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the distribution that is drawn from.")] = 1.0,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Draw every token of the vocabulary alike; needs no model in memory.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of what is drawn.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_memory: options.MaxMemory = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write text that a checkpoint draws from itself, to heal on beside your own: it has of every kind it has seen."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.options import Running, SampleSpec
        from moesurgeon.pipeline.sample import sample

        spec = SampleSpec(
            tokens=max_tokens, length=length, rows=rows, temperature=temperature, uniform=uniform, seed=seed
        )
        running = Running(device=device, dtype=dtype, max_memory=bytes_of(max_memory))
        return sample(checkpoint, output, spec, running, progress, overwrite=overwrite)

    answer(json, work, _show)


def _show(report: Report) -> None:
    print(
        f"{report['texts']:,} texts, {report['tokens']:,} tokens; {report['whole_texts']:,} came to their end, "
        f"{report['distinct']:,} differ"
        + ("" if report["uniform"] else f"; {report['tokens_per_second']:,.0f} tokens/s ({report['placement']})")
    )
    print(f"wrote {report['path']}")
