"""The options that heal, as the object that operations take, and how their result is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesurgeon.cli.output import Report

if TYPE_CHECKING:  # imported where it is used: `--help` needs none of it
    from moesurgeon.healing.pace import Method
    from moesurgeon.pipeline.options import HealSpec

_SHOWN = 4  # of the experts that a layer lost


def heal_spec(
    traces: list[str],
    method: Method,
    *,
    tokens: int,
    heldout: int,
    steps: int,
    router: bool,
    rank: int | None,
    teacher: str | None,
    sample: int | None = None,
    budget: Sequence[str] = (),
    merge: bool = False,
    validation: Sequence[str] = (),
) -> HealSpec | None:
    """Return what heals, or None where no text was named."""
    from moesurgeon.healing.pace import Pace
    from moesurgeon.pipeline.options import HealSpec
    from moesurgeon.traces.budgets import named_values

    if not traces:
        return None
    pace = Pace(steps=steps, router=router, rank=rank)
    return HealSpec(
        traces=tuple(traces),
        validation=tuple(validation),
        method=method,
        teacher=teacher,
        max_tokens=tokens,
        heldout_tokens=heldout,
        sample=sample,
        budgets=dict(named_values("--heal-budget", budget)),
        merge=merge,
        pace=pace,
    )


def show_choice(report: Report) -> None:
    """Print what the chosen subset of each layer leaves, and the best of the other criteria."""
    for layer in report.get("choice", {}).get("layers", []):
        others = {name: each["healed_error"] for name, each in layer["criteria"].items()}
        name = min(others, key=lambda each: others[each])
        compared = "all" if layer["exact"] else "a search"
        print(
            f"  layer {layer['layer']}: a refit leaves {layer['healed_error']:.4f} of {layer['error']:.4f}, with the "
            f"choice of {name} {others[name]:.4f} ({layer['refitted']} subsets refitted, {compared})"
        )


def show_healing(report: Report) -> None:
    """Print what healing did, layer by layer and to the held-out loss."""
    healing: Any = report.get("healed")
    if not healing:
        return
    if "planned" in healing:
        from moesurgeon.traces.amounts import amounts

        plan = healing["planned"]
        each = [f"{tokens} of {name}" for name, tokens in plan["budgets"].items()]
        if set(healing.get("text", {}).get("calibration", {None: None})) - set(plan["budgets"]):
            each.insert(0, f"{plan['max_tokens']:,} tokens{' of traces without a budget' if each else ''}")
        print(
            f"  would heal on {', '.join(plan['traces'])} by {plan['method']}, up to {', '.join(each)}"
            f"{', merging first' if plan['merge'] else ''}"
        )
        for role, domains in healing.get("text", {}).items():
            print(f"    {role} text: {amounts(domains)}")
        return
    for layer in report["healing"]:
        steps = ", ".join(
            f"{step['step']} {step['error']:.4f}{'' if step['kept'] else ' (left)'}" for step in layer["steps"]
        )
        print(f"  layer {layer['layer']}: error {layer['error']:.4f} -> {layer['healed_error']:.4f} ({steps})")
        _show_dropped(layer.get("dropped", []))
    loss, closed = healing["heldout"], healing["gap_closed"]
    after = "" if healing["method"] == "none" and "merge" not in healing else f", {loss['healed']:.4f} healed"
    share = f" ({closed:.0%} of the gap closed)" if after and closed is not None else ""
    for warning in healing.get("warnings", []):
        print(f"  {warning}")
    print(f"  held-out loss {loss['teacher']:.4f} before the cut, {loss['bare']:.4f} bare{after}{share}")
    if "merge" in healing:
        print(f"  {_merging(healing)}")
    if after and not healing["kept"]:
        print("  healing did not lower the held-out loss and was left out")


def _show_dropped(dropped: list[dict[str, Any]]) -> None:
    """Print of the experts that went, those with the most tokens, what was lost on them and who has them now."""
    seen = sorted((expert for expert in dropped if expert["tokens"]), key=lambda expert: -expert["tokens"])
    for expert in seen[:_SHOWN]:
        now = ", ".join(f"{other['expert']} ({other['share']:.0%})" for other in expert["now"])
        errors = f"{expert['error_before']:.4f} -> {expert['error_after']:.4f}"
        print(f"    expert {expert['expert']}: {expert['tokens']:,} held-out tokens, error {errors}, now with {now}")
    if len(seen) > _SHOWN:
        print(f"    and {len(seen) - _SHOWN} more that went (--json has them)")


def _merging(healing: Any) -> str:
    loss = healing["heldout"]
    if "merged" not in loss:
        return "merging was not better in any layer and was left out"
    verdict = "kept" if healing["merge"] else "left out"
    return f"merging was {verdict}: {loss['merged']:.4f} with it, {loss['unmerged']:.4f} without"
