"""The options that heal, as the object that operations take, and how their result is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesurgeon.cli.output import Report
from moesurgeon.errors import UsageError

if TYPE_CHECKING:  # imported where it is used: `--help` needs none of it
    from moesurgeon.healing.pace import Method
    from moesurgeon.pipeline.options import HealSpec


def heal_spec(
    traces: list[str],
    method: Method,
    *,
    tokens: int,
    steps: int,
    router: bool,
    teacher: str | None,
    merge: bool = False,
) -> HealSpec | None:
    """Return what heals, or None where no text was named."""
    from moesurgeon.healing.pace import Pace
    from moesurgeon.pipeline.options import HealSpec

    if not traces:
        if merge:
            raise UsageError("experts are merged by what they do on text: give --merge with --heal TRACES")
        return None
    pace = Pace(steps=steps, router=router)
    return HealSpec(traces=tuple(traces), method=method, teacher=teacher, max_tokens=tokens, merge=merge, pace=pace)


def show_healing(report: Report) -> None:
    """Print what healing did, layer by layer and to the held-out loss."""
    healing: Any = report.get("healed")
    if not healing:
        return
    if "planned" in healing:
        plan = healing["planned"]
        print(
            f"  would heal on {', '.join(plan['traces'])} by {plan['method']}, {plan['max_tokens']:,} tokens"
            f"{', merging first' if plan['merge'] else ''}"
        )
        return
    for layer in report["healing"]:
        steps = ", ".join(
            f"{step['step']} {step['error']:.4f}{'' if step['kept'] else ' (left)'}" for step in layer["steps"]
        )
        print(f"  layer {layer['layer']}: error {layer['error']:.4f} -> {layer['healed_error']:.4f} ({steps})")
    loss, closed = healing["heldout"], healing["gap_closed"]
    after = "" if healing["method"] == "none" and "merge" not in healing else f", {loss['healed']:.4f} healed"
    share = f" ({closed:.0%} of the gap closed)" if after and closed is not None else ""
    print(f"  held-out loss {loss['teacher']:.4f} before the cut, {loss['bare']:.4f} bare{after}{share}")
    if "merge" in healing:
        print(f"  {_merging(healing)}")
    if after and not healing["kept"]:
        print("  healing did not lower the held-out loss and was left out")


def _merging(healing: Any) -> str:
    loss = healing["heldout"]
    if "merged" not in loss:
        return "merging was not better in any layer and was left out"
    verdict = "kept" if healing["merge"] else "left out"
    return f"merging was {verdict}: {loss['merged']:.4f} with it, {loss['unmerged']:.4f} without"
