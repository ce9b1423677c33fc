"""``moesurgeon profile merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer
from moesurgeon.progress import Progress

NAME = "profile merge"


def command(
    profiles: Annotated[
        list[Path], typer.Argument(metavar="PROFILE...", help="Profiles of one checkpoint.", readable=False)
    ],
    output: options.ProfileOutput,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Add up profiles that were taken of one checkpoint on different text."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.profile_merge import merge

        return merge(profiles, output, overwrite=overwrite)

    answer(json, work, _show)


def _show(report: Report) -> None:
    domains = ", ".join(f"{domain} {count:,}" for domain, count in report["domains"].items())
    print(f"{report['tokens']:,} tokens: {domains}; {report['documents']:,} documents")
    for note in report["notes"]:
        print(f"note: {note}")
    print(f"wrote {report['path']}")
