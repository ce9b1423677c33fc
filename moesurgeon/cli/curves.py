"""How the errors of subsets are shown: of the one that was chosen, and by count."""

from __future__ import annotations

from typing import Any

from moesurgeon.cli.output import Report, table


def show_reconstruction(report: Report) -> None:
    """Print what the chosen subsets cost their layers, next to what REAP would."""
    found: Any = report.get("reconstruction")
    if not found:
        return
    layers = found["layers"]
    exact = sum(layer["exact"] for layer in layers.values())
    rows = []
    for number, layer in layers.items():
        compared = f"{layer['compared']:,}" + ("" if layer["exact"] else " *")
        rows.append([number, f"{layer['error']:.3%}", f"{layer['reap']:.3%}", compared])
    title = f"error of the layers' output on {found['tokens']:,} tokens"
    table(["layer", "error", "by reap", "compared"], rows, title + ("" if exact == len(layers) else "; *: not all"))


def show_curves(report: Report) -> None:
    """Print the error of each layer by how many experts stay, and how many have to for it to be small."""
    from moesurgeon.selection.curves import BEARABLE, columns, fewest

    found: Any = report.get("curve")
    if not found:
        return
    counts = columns([point["experts"] for point in next(iter(found.values()))][1:])
    rows = []
    for layer, points in found.items():
        errors = {point["experts"]: point["error"] for point in points}
        rows.append([layer, *(f"{errors[count]:.2%}" for count in counts), str(fewest(points))])
    title = "error of the layers' output by how many experts stay, one going at a time"
    table(["layer", *map(str, counts), "enough"], rows, f"{title}; enough: how few keep it under {BEARABLE:.0%}")
    if "curve_plot" in report:
        print(f"wrote {report['curve_plot']}")
