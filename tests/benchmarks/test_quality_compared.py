"""What criteria cost against one of them, on the report text and on the text that chooses."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks.prune_quality import measure_checkpoint
from benchmarks.quality_compared import compared
from benchmarks.quality_report import Results, Row, tables
from benchmarks.quality_text import Rows

POSITIONS = np.array([100.0, 200.0, 300.0, 400.0])


def _rows() -> list[Row]:
    """Return cuts by two criteria at two counts: report and validation say the opposite of each other."""
    part = {"domains": ["code"], "domain": [0] * 4, "positions": POSITIONS.tolist(), "teacher": POSITIONS.tolist()}
    rows: list[Row] = [{"text": "m", **part, "validation": part}]
    for criterion, report, validation in (("reap", 1.3, 1.5), ("gate", 1.4, 1.2)):
        for share in (0.25, 0.5):
            rows.append(
                {"checkpoint": "m", "layout": "coarse", "without": None, "seed": 0, "share": share, "keep": 6,
                 "criterion": criterion, "method": "bare", "losses": (POSITIONS * report).tolist(),
                 "validation": (POSITIONS * validation).tolist()}
            )  # fmt: skip
    return rows


@pytest.mark.parametrize(("on", "rise"), [("report", np.expm1(0.1)), ("validation", np.expm1(-0.3))])
def test_each_text_has_its_own_tables(on: str, rise: float) -> None:
    results = Results(_rows(), on=on)
    assert f"| m | {rise:+.1%} ({rise:+.1%} to {rise:+.1%}) |" in compared(results, "reap")
    assert f"| gate | {np.expm1(0.4 if on == 'report' else 0.2):+.1%}" in tables(results)


def test_rows_without_validation_text_have_none() -> None:
    rows = [{key: value for key, value in row.items() if key != "validation"} for row in _rows()]
    assert compared(Results(rows, on="validation"), "reap") == "" and compared(Results(rows), "reap")


def test_a_checkpoint_is_cut_with_fewer_experts_per_token(tmp_path: Path) -> None:
    """Its rows are its own, with the losses of both texts, and are not measured twice."""
    given = argparse.Namespace(
        corpora=None, fresh=False, report_tokens=1024, validation_tokens=1024, without=[], seeds=1, beside=[],
        shares=[0.25], criteria=["frequency", "reap"], methods=["bare"], profile_tokens=1024, inner=64,
    )  # fmt: skip
    rows = Rows(tmp_path / "rows.jsonl", {})
    measure_checkpoint("builtin:tiny-mixtral", given, rows, 1)
    results, chosen_by = Results(rows.all), Results(rows.all, on="validation")
    assert [(row["checkpoint"], row["criterion"], row["keep"]) for row in results.rows] == [
        ("tiny-mixtral, top-1", "frequency", 6), ("tiny-mixtral, top-1", "reap", 6)
    ]  # fmt: skip
    uncut, other = results.texts["tiny-mixtral, top-1"], chosen_by.texts["tiny-mixtral, top-1"]
    assert uncut.teacher.sum() != pytest.approx(other.teacher.sum())
    assert all(np.sum(row["losses"]) > uncut.teacher.sum() for row in results.rows)
    before = len(rows.all)
    measure_checkpoint("builtin:tiny-mixtral", given, Rows(tmp_path / "rows.jsonl", {}), 1)
    assert len(Rows(tmp_path / "rows.jsonl", {}).all) == before
