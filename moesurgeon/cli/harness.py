"""``moesurgeon harness``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgeon.cli import options
from moesurgeon.cli.output import Report, answer, table
from moesurgeon.cli.sizes import bytes_of
from moesurgeon.progress import Progress

NAME = "harness"


def command(
    checkpoint: options.Source,
    task: Annotated[
        list[str],
        typer.Option("--task", metavar="NAME_OR_YAML", help="A task: lm-eval's name or a YAML file. Repeat for more."),
    ],
    tasks_folder: Annotated[
        Path | None, typer.Option("--tasks-folder", metavar="DIR", help="A folder with more tasks.", readable=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task at most. Default: all.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_memory: options.MaxMemory = None,
    json: options.Json = False,
) -> None:
    """Run tasks of the lm-evaluation-harness (pip install 'moesurgeon[harness]')."""

    def work(progress: Progress) -> Report:
        from moesurgeon.pipeline.harness import HarnessSpec, harness
        from moesurgeon.pipeline.options import Running

        spec = HarnessSpec(tasks=tuple(task), folder=tasks_folder, limit=limit)
        running = Running(device=device, dtype=dtype, max_memory=bytes_of(max_memory))
        return harness(checkpoint, spec, running, progress)

    answer(json, work, _show)


def _show(report: Report) -> None:
    rows = []
    for task, figures in report["tasks"].items():
        for name, value in figures.items():
            metric, _, how = name.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{how}")
            rows.append(
                [
                    task,
                    metric if how == "none" else f"{metric} ({how})",
                    "-" if value is None else f"{value:.4f}",
                    "-" if error is None else f"{error:.4f}",
                    f"{report['samples'].get(task, 0):,}",
                ]
            )
    table(["task", "metric", "value", "standard error", "examples"], rows, report["checkpoint"])
    print(f"lm-eval {report['harness_version']} ({report['placement']})")
