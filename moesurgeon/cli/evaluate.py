"""``moesurgeon evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer, table
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.progress import Progress

NAME = "evaluate"


def command(
    checkpoint: options.Source,
    against: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="Compare with this checkpoint, usually the unedited one."),
    ] = None,
    traces: options.Traces = ["builtin:all"],  # noqa: B006 - typer copies it
    split: options.SplitOption = None,
    max_tokens: options.MaxTokens = 65536,
    budget: options.Budget = [],  # noqa: B006 - typer copies it
    sample: options.Sample = None,
    length: options.Length = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_memory: options.MaxMemory = None,
    json: options.Json = False,
) -> None:
    """Measure loss and perplexity per domain on held-out text, with intervals over documents."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.evaluate import evaluate
        from moesurgeon.pipeline.options import Running, Text
        from moesurgeon.traces.budgets import named_values

        text = Text(
            traces=tuple(traces),
            split=split,
            max_tokens=max_tokens,
            length=length,
            budgets=dict(named_values("--budget", budget)),
            sample=sample,
        )
        return evaluate(
            checkpoint, against, text, Running(device=device, dtype=dtype, max_memory=bytes_of(max_memory)), progress
        )

    answer(json, work, _show)


def _show(report: Report) -> None:
    compared = "against" in report
    headings = ["domain", "tokens", "documents", "loss", "perplexity", "95 % interval"]
    headings += ["ratio", "95 % interval", "KL", "agreement", "ESAP"] if compared else []
    rows = []
    for domain, figures in (*report["domains"].items(), ("all", report)):
        row = _row(domain, figures)
        if compared:
            distance = report["against"] if domain == "all" else report["against"]["domains"][domain]
            row += [
                f"{distance['perplexity_ratio']:.3f}",
                interval(distance["interval"], 3),
                f"{distance['kl']:.4f}",
                f"{distance['agreement']:.1%}",
                f"{distance['esap']:.3f}",
            ]
        rows.append(row)
    title = f"{report['checkpoint']}" + (f" against {report['compared_with']}" if compared else "")
    table(headings, rows, title)
    positions = ", ".join(f"{span}: {part['perplexity']:.2f}" for span, part in report["lengths"].items())
    print(f"perplexity by position: {positions}")
    print(f"{report['tokens_per_second']:,.0f} tokens/s ({report['placement']})")


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{figures['tokens']:,}",
        str(figures["documents"]),
        f"{figures['loss']:.4f}",
        f"{figures['perplexity']:.2f}",
        interval(figures["interval"], 2),
    ]


def interval(bounds: list[float], digits: int) -> str:
    return f"{bounds[0]:.{digits}f} - {bounds[1]:.{digits}f}"
