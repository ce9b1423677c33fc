"""The figures of the benchmark of recovery: those of the formulas, the worst layer's, and bars met and missed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality_report import Row, closed
from benchmarks.recover_control import control
from benchmarks.recover_report import Results, balance_of, bars, domain_table, tables, told
from benchmarks.recover_ways import WAYS
from tests.benchmarks.test_quality_report import BARE, POSITIONS, TEACHER, TEXT
from tests.engine.small import corpus_of, random_windows, running, saved, small_model


def usage(*least: float, fallen: int = 0, starved: int = 0) -> dict[str, Any]:
    """Return the use of layers of 8 experts whose least used have so much of a fair share; who fell is in the last."""
    layers = {
        str(number): {"entropy": 1 - number / 10, "max_over_mean": 2.0 + number, "least": value, "dead": [],
                      "overflow": {"1": 0.3, "1.25": 0.2 + number / 10, "2": 0.1}, "fallen": [], "starved": []}
        for number, value in enumerate(least)
    }  # fmt: skip
    layers[str(len(least) - 1)] |= {"fallen": list(range(fallen)), "starved": list(range(starved))}
    return layers


def rows_of(left: dict[str, tuple[float, float]], *, top_k: tuple[int, int] = (2, 1), fallen: int = 0) -> list[Row]:
    """Return rows of a bare edit and of ways that leave this share of its gap, by way and seed."""
    text = {"text": "m", "domains": list(TEXT.domains), "domain": TEXT.domain.tolist(),
            "positions": POSITIONS.tolist(), "teacher": TEACHER.tolist()}  # fmt: skip
    rows: list[Row] = [{"options": {}}, text]
    for way, shares in {"bare": (1.0,), "cut": (2.0,), **left}.items():
        for seed, share in enumerate(shares):
            rows.append(
                {"checkpoint": "m", "top_k": list(top_k), "way": way, "seed": seed, "tokens": 1000 * (seed + 1),
                 "cpu_seconds": 10.0, "losses": (TEACHER + (BARE - TEACHER) * share).tolist(),
                 "usage": usage(0.5, 0.3, fallen=0 if way in ("bare", "cut") else fallen)}
            )  # fmt: skip
    return rows


def test_the_balance_is_that_of_the_worst_layer() -> None:
    found = balance_of(usage(0.5, 0.3, fallen=2, starved=1))
    assert found == {
        "entropy": 0.9, "busiest": 3.0, "least": 0.3, "overflow": {"1": 0.3, "1.25": pytest.approx(0.3), "2": 0.1},
        "fallen": 2, "starved": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("left", "fallen", "met"), [(0.1, 0, True), (0.4, 1, False)])
def test_bars(left: float, fallen: int, met: bool) -> None:
    shares = (left, left * 1.2)
    ways = {"layers": shares, "layers, experts-all": shares, "cut, layers, experts-all": shares}
    found = {bar["bar"]: bar for bar in bars(Results(rows_of(ways, fallen=fallen)))}
    assert list(found) == [0.65, 0.85, 0.0, 1.05] and all(bar["met"] == met for bar in found.values())
    assert found[0.85]["value"] == pytest.approx(1 - left * 1.1)  # the mean of the seeds' losses
    assert found[0.85]["worst_seed"] == pytest.approx(1 - left * 1.2)
    assert found[0.0]["value"] == fallen
    gap = (BARE - TEACHER).sum() / POSITIONS.sum()
    assert found[1.05]["value"] == pytest.approx(np.exp(gap * left * 1.1))
    assert all(bar["text"].endswith("met" if met else "MISSED") for bar in found.values())


def test_the_bar_of_the_gap_is_for_top_1() -> None:
    found = bars(Results(rows_of({"layers": (0.1,), "layers, experts-all": (0.1,)}, top_k=(4, 2))))
    assert [bar["bar"] for bar in found] == [0.0]


def test_a_cut_is_held_against_the_bare_cut() -> None:
    results = Results(rows_of({"layers": (0.5,), "cut, layers": (0.5,)}))
    table = tables(results)
    (cut,) = (line for line in table.splitlines() if line.startswith("| cut, layers |"))
    (layers,) = (line for line in table.splitlines() if line.startswith("| layers |"))
    assert " 75% (75% to 75%) " in cut and " 50% (50% to 50%) " in layers
    assert closed(TEXT, 2 * BARE - TEACHER, (BARE + TEACHER) / 2)[0] == pytest.approx(0.75)
    (line,) = (told(results, row) for row in results.rows if row["way"] == "cut, layers")
    assert "closed 75%" in line and "least used 0.30" in line


def test_tables_have_a_row_for_every_way_and_a_column_for_every_domain() -> None:
    results = Results(rows_of({"layers": (0.2, 0.3), "control": (1.1,)}))
    table = tables(results)
    assert table.count("\n| control |") == table.count("\n| layers | 2 |") == 1 and "m, top-2 -> top-1" in table
    assert "| 1,500 | 10 |" in table  # tokens and CPU seconds on average
    assert "| way | code | prose |" in domain_table(results) and domain_table(results).count("\n| layers |") == 1


def test_every_way_starts_from_one_that_is_there() -> None:
    for way in WAYS.values():
        if way.adapt or way.is_control:
            start = [one for one in WAYS.values() if (one.heal, one.cut) == (way.heal, way.cut) and not one.has_seed]
            start += [one for one in WAYS.values() if (one.heal, one.cut, one.adapt) == (way.heal, way.cut, ())]
            assert start
    assert len(set(WAYS.values())) == len(WAYS)  # a way names its folder


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v1"])
def test_the_control_changes_routers_alone(family: str, tmp_path: Path) -> None:
    subject = saved(small_model(family, num_hidden_layers=2, num_experts_per_tok=1), tmp_path / "model")
    text = corpus_of(random_windows("a", count=4, vocabulary=90))
    before = {name: weight.clone() for name, weight in running(subject).named_parameters()}
    given = argparse.Namespace(tokens_per_step=128, steps=3, control_rate=1e-2)
    after = dict(control(running(subject), subject.anatomy, text, 32, given, 0).named_parameters())
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("gate.weight")}


def test_every_way_begins_from_one_that_is_measured() -> None:
    assert all(way.start in WAYS.values() for way in WAYS.values())
