"""How it is shown what a profile says of fewer experts per token."""

from __future__ import annotations

from typing import Any

from moesurgeon.cli.output import Report, table


def show_foreseen(report: Report) -> None:
    """Print how even routing would be, and what each layer loses by k."""
    if report.get("collapse"):
        _show_collapse(report["collapse"], report["top_k"]["after"])
    if "per_layer" in report:
        _show_errors(report)
    if "divided" in report:
        _show_divided(report)


def _show_collapse(layers: Any, top_k: int) -> None:
    """Print the balance of each layer, with what overflows in the largest dispatch that was seen."""
    overflow = {layer: figures["overflow"] or {} for layer, figures in layers.items()}
    size = max((size for sizes in overflow.values() for size in sizes), key=int, default="")
    factors = list(next((sizes[size] for sizes in overflow.values() if size in sizes), ()))
    rows = []
    for layer, figures in layers.items():
        now = figures["as_is"]
        dropped = overflow[layer].get(size, {})
        rows.append(
            [
                f"{layer}{' *' if figures['collapsed'] else ''}", f"{now['entropy']:.3f}", f"{figures['entropy']:.3f}",
                f"{now['max_over_mean']:.2f}", f"{figures['max_over_mean']:.2f}", str(len(figures["unused"])),
                str(len(figures["starved"])), *(f"{dropped[factor]:.1%}" if dropped else "" for factor in factors),
            ]
        )  # fmt: skip
    headings = ["layer", "entropy", f"top-{top_k}", "max/mean", f"top-{top_k}", "unused", "starved"]
    title = f"routing as it is and as top-{top_k}, by the profile"
    if factors:
        title += f"; what overflows by capacity factor, in dispatches of {size} tokens"
    if any(figures["collapsed"] for figures in layers.values()):
        title += "; *: collapsed"
    table([*headings, *(f"x {factor}" for factor in factors)], rows, title)


def _show_errors(report: Report) -> None:
    """Print the error of each layer by k; in brackets with its best scale."""
    layers: Any = report["per_layer"]
    counts = list(next(iter(layers.values()))["errors"])[:-1]
    rows = []
    for layer, found in layers.items():
        errors = [f"{found['errors'][k]:.2%} ({found['scaled'][k]:.2%})" for k in counts]
        scale = f"{found['scale'][str(report['top_k']['after'])]:.3f}"
        rows.append([f"{layer}{' *' if int(layer) in report['rather'] else ''}", *errors, scale])
    title = "error of the layers' output by experts per token (with the best scale for the layer)"
    if report["rather"]:
        title += f"; *: would rather keep more than {report['top_k']['after']}"
    table(["layer", *counts, "scale"], rows, title)


def _show_divided(report: Report) -> None:
    found: Any = report["divided"]
    each = ", ".join(f"{layer}: {k}" for layer, k in found["top_k"].items())
    same = ", ".join(f"{error:.2%} with {k}" for k, error in found["uniform"].items())
    print(f"  {found['average']:g} experts per token on average, by layer: {each}")
    print(f"  mean error {found['error']:.2%}; the same everywhere: {same}")
    if "per_layer_out" in report:
        print(f"  {'would write' if report['dry_run'] else 'wrote'} {report['per_layer_out']}")
