"""``moesurgeon evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer, interval, table
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.cli.texts import text_of
from moesurgeon.progress import Progress

NAME = "evaluate"

_DEGENERATION = {
    "repetition_rate": ".1%", "distinct_1": ".2f", "distinct_2": ".2f", "distinct_4": ".2f", "loops": ".0%",
    "first_loop_at": ".0f", "early_stop": ".0%",
}  # fmt: skip


def command(
    checkpoint: options.Source,
    against: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="Compare with this checkpoint, usually the unedited one."),
    ] = None,
    traces: options.Traces = ["builtin:all"],  # noqa: B006 - typer copies it
    gate: Annotated[
        list[str],
        typer.Option(
            metavar="EXPR",
            help="A condition on the report, as 'perplexity_ratio <= 1.02 and kl < 0.05': exit code 4 if it does not "
            "hold. Repeat for more.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    continuations: Annotated[
        int, typer.Option(min=0, help="Prompts to continue greedily, to see how much of it is repetition.")
    ] = 0,
    new_tokens: Annotated[int, typer.Option(min=8, help="Tokens to continue a prompt by, at most.")] = 64,
    include_healed: Annotated[
        bool,
        typer.Option(
            "--include-healed",
            help="Measure on documents that healed or trained one of the checkpoints, too. Default: they are left out, "
            "by moesurgeon.json.",
        ),
    ] = False,
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
        from moesurgeon.pipeline.evaluate import EvaluateSpec, evaluate
        from moesurgeon.pipeline.options import Running

        text = text_of(traces, split=split, max_tokens=max_tokens, length=length, budget=budget, sample=sample)
        running = Running(device=device, dtype=dtype, max_memory=bytes_of(max_memory))
        spec = EvaluateSpec(
            gates=tuple(gate), continuations=continuations, new_tokens=new_tokens, include_healed=include_healed
        )
        return evaluate(checkpoint, against, text, running, progress, spec)

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
    _show_lengths(report["lengths"], compared)
    if "degeneration" in report:
        _show_degeneration(report, compared)
    if "gate" in report:
        print(f"gate {'passed' if report['gate']['passed'] else 'failed'}: {report['gate']['expression']}")
    print(f"{report['tokens_per_second']:,.0f} tokens/s ({report['placement']})")


def _show_lengths(lengths: dict[str, Any], compared: bool) -> None:
    headings = ["positions", "tokens", "documents", "perplexity", "95 % interval"]
    headings += ["ratio", "95 % interval"] if compared else []
    rows = [
        [
            span,
            f"{part['tokens']:,}",
            f"{part['documents']:,}",
            f"{part['perplexity']:.2f}",
            interval(part["interval"], 2),
            *([f"{part['perplexity_ratio']:.3f}", interval(part["ratio_interval"], 3)] if compared else []),
        ]
        for span, part in lengths.items()
    ]
    table(headings, rows, "By position in the window")


def _show_degeneration(report: Report, compared: bool) -> None:
    """One row for each domain, the figures of the other checkpoint in brackets behind."""
    mine = report["degeneration"]
    theirs = report["against"]["degeneration"] if compared else None
    rows = []
    for domain, figures in (*mine["domains"].items(), ("all", mine)):
        other = None if theirs is None else theirs if domain == "all" else theirs["domains"][domain]
        row = [domain, f"{figures['prompts']}"]
        for name, form in _DEGENERATION.items():
            values = [figures[name]] if other is None else [figures[name], other[name]]
            first, *second = ("-" if value is None else format(value, form) for value in values)
            row.append(first + "".join(f" ({value})" for value in second))
        rows.append(row)
    headings = ["domain", "prompts", *(name.replace("_", " ") for name in _DEGENERATION)]
    title = f"Greedy continuations, {mine['new_tokens']} tokens" + (" (the other checkpoint's)" if compared else "")
    table(headings, rows, title)


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{figures['tokens']:,}",
        str(figures["documents"]),
        f"{figures['loss']:.4f}",
        f"{figures['perplexity']:.2f}",
        interval(figures["interval"], 2),
    ]
