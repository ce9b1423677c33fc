"""``profile show``: what a profile says, as figures, a spreadsheet and a picture."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.places import refuse_within
from moesurgeon.checkpoint.whole_file import refuse_file, whole_file
from moesurgeon.errors import UsageError
from moesurgeon.profiling.artefact import Profile, load_profile
from moesurgeon.profiling.rows import COLUMNS, coldest, experts_of, spreadsheet


@dataclass(frozen=True, kw_only=True)
class ShowSpec:
    """``layer``: that one expert by expert; ``table``: a CSV file to write; ``plot``: a picture to write.

    ``overwrite``: replace files of these names.
    """

    layer: int | None = None
    table: Path | None = None
    plot: Path | None = None
    overwrite: bool = False


def show(path: Path, spec: ShowSpec) -> dict[str, Any]:
    """Return the summary of the profile in ``path``; write what ``spec`` asks for."""
    for option, file in (("--csv", spec.table), ("--plot", spec.plot)):
        if file is not None:
            refuse_file(file, option, overwrite=spec.overwrite)
            refuse_within(file, option, path)
    if spec.plot is not None:
        from moesurgeon.report.heatmaps import check_drawable, draw

        check_drawable(spec.plot)  # before the table is written
    profile = load_profile(path)
    statistics = profile.statistics
    if spec.layer is not None and spec.layer not in statistics.layers:
        raise UsageError(f"--layer {spec.layer} is not in the profile; it has {_ranges(statistics.layers)}")
    report: dict[str, Any] = {"path": str(path), "experts": statistics.experts, "top_k": statistics.top_k}
    report |= profile.summary()
    for layer in statistics.layers:
        report["layers"][str(layer)]["coldest"] = coldest(statistics, layer)
    if spec.layer is not None:
        report["layer"] = {"number": spec.layer, "experts": experts_of(statistics, spec.layer)}
    if spec.table is not None:
        _write_table(profile, spec.table)
        report["csv"] = str(spec.table)
    if spec.plot is not None:
        draw(profile, spec.plot)
        report["plot"] = str(spec.plot)
    return report


def _write_table(profile: Profile, path: Path) -> None:
    with whole_file(path, overwrite=True) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(spreadsheet(profile.statistics))


def _ranges(layers: tuple[int, ...]) -> str:
    """Return numbers of layers in few words.

    >>> _ranges((0, 2, 3, 4))
    'layers 0, 2-4'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "layers " + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
