"""``moesurgeon profile import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer
from moesurgeon.progress import Progress

NAME = "profile import"


def command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Token counts per layer and expert: JSON, CSV, SGLang's or EPLB's.", readable=False
        ),
    ],
    output: options.ProfileOutput,
    checkpoint: Annotated[str, typer.Option(metavar="CKPT", help="The checkpoint that was served.")],
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Make a profile of the token counts that a server recorded; it serves the frequency criterion only."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.profile_import import import_counts

        return import_counts(file, checkpoint, output, overwrite=overwrite)

    answer(json, work, _show)


def _show(report: Report) -> None:
    print(f"{report['tokens']:,} tokens in {len(report['layers'])} layers; prune with --criterion frequency")
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    print(f"wrote {report['path']}")
