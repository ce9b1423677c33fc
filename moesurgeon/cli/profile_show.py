"""``moesurgeon profile show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer, bar, between, table
from moesurgeon.progress import Progress

NAME = "profile show"


def command(
    profile: options.Profile,
    layer: Annotated[int | None, typer.Option(help="This layer, expert by expert.")] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a row per domain, bucket of positions, layer and expert to this CSV.",
            readable=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw heatmaps of experts by layers: .png or .svg; needs matplotlib.", readable=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")] = False,
    json: options.Json = False,
) -> None:
    """Show what a profile says: who is used and how surely, who serves what, what would overflow, what looks wrong."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.profile_show import ShowSpec, show

        return show(profile, ShowSpec(layer=layer, table=csv, plot=plot, overwrite=overwrite))

    answer(json, work, _show)


def _show(report: Report) -> None:
    domains = ", ".join(f"{domain} {count:,}" for domain, count in report["domains"].items())
    print(f"{report['path']}: {report['experts']} experts, top-{report['top_k']}")
    print(f"{report['tokens']:,} tokens: {domains}; {report['documents']:,} documents")
    if report["counts_only"]:
        print("a server's token counts: nothing is known of weights, outputs and documents")
    if "layer" in report:
        _show_experts(report["layer"])
    else:
        _show_layers(report)
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    for written in (report.get("csv"), report.get("plot")):
        if written:
            print(f"wrote {written}")


def _show_layers(report: Report) -> None:
    rows = [
        [layer, bar(figures["utilization"]), f"{figures['entropy']:.3f}", f"{figures['max_over_mean']:.2f}",
         f"{figures['variation']:.2f}", f"{figures['gini']:.2f}"]
        for layer, figures in report["layers"].items()
    ]  # fmt: skip
    table(["layer", "utilization", "entropy", "max/mean", "CV", "Gini"], rows)
    rows = [
        [layer if number == 0 else "", str(expert["expert"]), f"{expert['share']:.3%}", between(expert["interval"]),
         _serves(expert)]
        for layer, figures in report["layers"].items()
        for number, expert in enumerate(figures["coldest"])
    ]  # fmt: skip
    table(["layer", "coldest", "share", "95 % interval", "serves most"], rows, left=("serves most",))
    _show_overflow(report["layers"])


def _show_overflow(layers: dict[str, Any]) -> None:
    """Print what does not fit in the largest dispatch that was seen, for the gate as it is and for top-1."""
    sizes = [size for figures in layers.values() for size in figures.get("overflow", {})]
    if not sizes:
        return
    size = max(sizes, key=int)
    factors = list(next(iter(layers.values()))["overflow"][size]["as_is"]["dropped"])
    rows = []
    for layer, figures in layers.items():
        gates = figures["overflow"].get(size)
        if gates:
            dropped = [gates[gate]["dropped"][factor] for gate in ("as_is", "top_1") for factor in factors]
            rows.append([layer, *(f"{share:.1%}" for share in dropped)])
    headings = [f"{factor}{gate}" for gate in ("", " top-1") for factor in factors]
    table(["layer", *headings], rows, f"choices that overflow, by capacity factor, in dispatches of {size} tokens")


def _show_experts(layer: dict[str, Any]) -> None:
    rows = [
        [str(expert["expert"]), f"{expert['tokens']:,}", f"{expert['share']:.3%}", between(expert["interval"]),
         known(expert["gate_mass"], ".4f"), known(expert["first_choice"], ".3%"), known(expert["reap"], ".4g"),
         known(expert["peak"], ".4g"), *(f"{share:.3%}" for share in expert["domains"].values()), _niches(expert)]
        for expert in layer["experts"]
    ]  # fmt: skip
    names = list(layer["experts"][0]["domains"])
    headings = ["expert", "tokens", "share", "95 % interval", "gate mass", "top-1", "REAP", "peak", *names, "niche"]
    table(headings, rows, f"layer {layer['number']}", left=("niche",))


def _serves(expert: dict[str, Any]) -> str:
    if expert["serves"] is None:
        return "never routed to"
    serves = f"{expert['serves']['domain']} ({expert['serves']['share']:.3%})"
    return "; ".join(filter(None, (serves, _niches(expert))))


def _niches(expert: dict[str, Any]) -> str:
    return ", ".join(f"{niche['times']:.1f} x in {niche['where'] or niche['kind']}" for niche in expert["niches"])


def known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
