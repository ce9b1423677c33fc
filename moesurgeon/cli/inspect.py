"""``moesurgeon inspect``."""

from __future__ import annotations

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, amount, answer, facts, size
from moesurgeon.progress import Progress

NAME = "inspect"


def command(checkpoint: options.Source, json: options.Json = False) -> None:
    """Show what a checkpoint is: family, experts, parameters, FLOPs, problems. Reads headers and routers only."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.inspect import inspect

        return inspect(checkpoint)

    answer(json, work, _show)


def _show(report: Report) -> None:
    parameters, flops = report["parameters"], report["flops_per_token"]
    routing = report["routing"]
    rows = [
        ("layers", f"{report['layers']}, {len(report['moe_layers'])} of them mixtures of experts"),
        ("experts", f"{report['experts']} of width {report['expert_width']}, top-{report['top_k']}"),
        ("shared experts", str(report["shared_experts"])),
        (
            "router",
            f"{routing['scoring']}, {'renormalised' if routing['renormalises'] else 'not renormalised'}",
        ),
        (
            "parameters",
            f"{amount(parameters['total'])} ({amount(parameters['active'])} active, "
            f"{amount(parameters['experts'])} in experts)",
        ),
        ("FLOPs per token", amount(flops["total"])),
        *((f"  {part.replace('_', ' ')}", amount(count)) for part, count in flops.items() if part != "total" and count),
        (
            "size",
            f"{size(report['bytes'])} in {report['shards']} shards, {report['dtype']}, {report['layout']}",
        ),
    ]
    if routing["groups"] > 1:
        rows.insert(4, ("groups", f"{routing['kept_groups']} of {routing['groups']}"))
    if report["mtp_layers"]:
        rows.insert(1, ("MTP layers", str(len(report["mtp_layers"]))))
    if report["left_out"]:
        rows.append(("not copied", ", ".join(report["left_out"][:6]) + (", ..." if report["left_out"][6:] else "")))
    facts(f"{report['checkpoint']}: {report['title']}", rows)
    for problem in report["problems"]:
        print(f"  problem: {problem}")
