"""``moesurgeon verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer, size
from moesurgeon.progress import Progress

NAME = "verify"


def command(
    checkpoint: options.Source,
    source: Annotated[
        str | None, typer.Option(metavar="CKPT", help="Prove byte by byte that what was kept is this one's.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Read every byte and report a SHA-256 for each tensor.")] = False,
    json: options.Json = False,
) -> None:
    """Check that a checkpoint is whole: headers, index, counts, shapes, provenance."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.verify import verify

        return verify(checkpoint, source, progress, full=full)

    answer(json, work, _show)


def _show(report: Report) -> None:
    print(f"{report['checkpoint']}: whole, {report['tensors']} tensors, {size(report['bytes'])}")
    for operations in report["history"]:
        print("  " + ", then ".join(str(operation.get("operation")) for operation in operations))
    if "source" in report:
        print(
            f"  against {report['source']}: {report['tensors_equal']} tensors equal byte by byte, "
            f"{report['tensors_replaced']} replaced, {report['tensors_dropped']} of the source dropped"
        )
    if "hashes" in report:
        compared = report["hashes_compared"]
        print(
            f"  {len(report['hashes'])} tensors hashed; --json lists the hashes"
            + (", equal to the record's" if compared else "")
        )
