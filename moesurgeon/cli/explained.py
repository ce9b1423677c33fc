"""What ``prune`` says of the experts that go, and of those that were protected, for people."""

from __future__ import annotations

from typing import Any

from moesurgeon.cli.output import Report, between, table


def show_protection(report: Report) -> None:
    """Print by layer what protection changed."""
    protection = report.get("protection")
    if not protection:
        return
    names = ", ".join(
        name if share is None else f"{name} (a share of {share:.3g})" for name, share in protection["names"].items()
    )
    layers = protection["layers"]
    count = sum(len(layer["protected"]) for layer in layers.values())
    print(f"  protected for {names}: {count} experts")
    for layer, found in layers.items():
        if found["kept_instead"]:
            print(
                f"  layer {layer} keeps {_experts(found['kept_instead'])} for it, and loses "
                f"{_experts(found['dropped_instead'])} instead"
            )


def show_explained(report: Report) -> None:
    """Print a table of the experts that go."""
    explained: dict[str, list[dict[str, Any]]] = report["explained"]
    rows = [
        [
            layer if number == 0 else "",
            str(expert["expert"]),
            f"{expert['share']:.2%}{'' if expert['support'] else ' (hardly seen)'}",
            between(expert["interval"]),
            _most(expert["utilization"]),
            "" if expert["value"] is None else f"{expert['value']:.4g}",
            "" if expert["rank"] is None else str(expert["rank"]),
            _places(expert["goes_to"]),
            _places(expert["beside"]),
        ]
        for layer, experts in explained.items()
        for number, expert in enumerate(experts)
    ]
    if not rows:
        return
    headings = [
        "layer",
        "expert",
        "share",
        "95 % interval",
        "most in",
        report["criterion"],
        "rank",
        "goes to",
        "beside",
    ]
    title = "what goes: its share of the layer's choices, who takes its place, and who had its tokens as well"
    table(headings, rows, title, left=("most in", "goes to", "beside"))
    if report["destinations"]["from"] is None:
        print(f"  where tokens go is not known: {report['destinations']['reason']}")


def _most(domains: dict[str, dict[str, Any]]) -> str:
    """Return the domain that uses an expert most, and how much."""
    name, most = max(domains.items(), key=lambda item: item[1]["share"])
    return f"{name} {most['share']:.2%}" if most["share"] else "none"


def _places(experts: list[dict[str, Any]] | None) -> str:
    return ", ".join(f"{place['expert']} ({place['share']:.0%})" for place in experts or ())


def _experts(experts: list[int]) -> str:
    return f"expert{'' if len(experts) == 1 else 's'} {_listed(experts)}"


def _listed(experts: list[int]) -> str:
    return ", ".join(map(str, experts)) or "none"
