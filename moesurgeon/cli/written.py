"""How a written (or planned) checkpoint is shown."""

from __future__ import annotations

from moesurgeon.cli.output import Report, size


def show_written(report: Report) -> None:
    """Print what was written where, or for a dry run what would have been."""
    plan = report["plan"]
    edits = ", ".join(f"{count} {verb}" for verb, count in sorted(plan["tensors"].items()))
    dropped = sum(plan["dropped"].values())
    print(f"  tensors: {edits}" + (f"; {dropped} dropped" if dropped else ""))
    for key, value in plan["config"].items():
        print(f"  config: {key} = {value}" if value is not None else f"  config: {key} removed")
    for file in plan["files"]:
        print(f"  file: {file}")
    for statement in report["runtimes"]:
        print(f"  runtimes: {statement}")
    change = f"{size(report['bytes_before'])} -> {size(report['bytes_after'])}"
    if report["dry_run"]:
        print(f"  would write {report['output']}: {change}")
        if "output_refused" in report:
            print(f"  note: without --dry-run this would be refused: {report['output_refused']}")
    else:
        linked = f", {report['linked_shards']} linked" if report["linked_shards"] else ""
        resumed = f", {report['resumed_shards']} finished earlier" if report["resumed_shards"] else ""
        print(f"  wrote {report['output']}: {change}, {report['shards']} shards{linked}{resumed}")
