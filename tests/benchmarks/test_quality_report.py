"""The figures of the benchmark of quality: those of the formulas, and bars that can be met and missed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quality_report import Judged, Results, Row, bars, closed, difference, rise, tables, unseen_table

RANDOM = np.random.default_rng(0)
POSITIONS = RANDOM.integers(50, 400, 40).astype(float)
TEACHER = POSITIONS * RANDOM.uniform(1.5, 2.5, 40)
TEXT = Judged(("code", "prose"), np.arange(40) % 2, POSITIONS, TEACHER)
BARE = TEACHER + POSITIONS * RANDOM.uniform(0.2, 0.4, 40)


def test_a_rise_is_the_ratio_of_perplexities() -> None:
    value, low, high = rise(TEXT, BARE)
    perplexity, uncut = (np.exp(losses.sum() / POSITIONS.sum()) for losses in (BARE, TEACHER))
    assert value == pytest.approx(perplexity / uncut - 1)
    assert 0.2 < low < value < high < 0.5
    code = slice(0, None, 2)
    in_code = np.exp((BARE - TEACHER)[code].sum() / POSITIONS[code].sum()) - 1
    assert rise(TEXT, BARE, "code")[0] == pytest.approx(in_code)
    assert rise(TEXT, TEACHER) == (0.0, 0.0, 0.0)
    assert difference(TEXT, BARE, BARE) == (0.0, 0.0, 0.0)


def test_what_is_closed_is_paired_by_document() -> None:
    """Half of each document's gap is closed: half of the whole, whichever documents there are."""
    assert closed(TEXT, BARE, (BARE + TEACHER) / 2) == pytest.approx((0.5, 0.5, 0.5))
    value, low, high = closed(TEXT, BARE, TEACHER + (BARE - TEACHER) * RANDOM.uniform(0, 1, 40))
    assert low < value < high < 1


def _rows(left: dict[str, float]) -> list[Row]:
    """Return a coarse checkpoint with a bare and a healed cut by each criterion; ``left``: the share of the gap."""
    text = {"text": "m", "domains": list(TEXT.domains), "domain": TEXT.domain.tolist(),
            "positions": POSITIONS.tolist(), "teacher": TEACHER.tolist()}  # fmt: skip
    rows: list[Row] = [{"options": {}}, text]
    for criterion, share in left.items():
        for seed in range(3):
            for method, part in (("bare", 1.0), ("distill", share * (1 + seed / 10))):
                losses = TEACHER + (BARE - TEACHER) * part
                rows.append(
                    {"checkpoint": "m", "layout": "coarse", "without": None, "seed": seed, "share": 0.25, "keep": 6,
                     "criterion": criterion, "method": method, "losses": losses.tolist()}
                )  # fmt: skip
    return rows


@pytest.mark.parametrize(("reap", "healed", "met"), [(0.08, 0.06, True), (0.2, 0.3, False)])
def test_bars(reap: float, healed: float, met: bool) -> None:
    found = bars(Results(_rows({"reap": reap, "healed": healed})))
    assert len(found) == 5 and all(bar["met"] == met for bar in found)
    gap = found[0]
    assert gap["value"] == pytest.approx(1 - reap * 1.1)  # the mean of the seeds' losses
    assert gap["worst_seed"] == pytest.approx(1 - reap * 1.2)
    assert gap["text"].endswith("met" if met else "MISSED")


def test_healed_is_held_against_others_over_all_cuts() -> None:
    """Worse at a quarter by less than it is better at a half: better on average."""
    first = _rows({"reap": 0.10, "healed": 0.12})
    second = [{**row, "share": 0.5} for row in _rows({"reap": 0.20, "healed": 0.16}) if "losses" in row]
    *_, last = bars(Results(first + second))
    assert last["name"].startswith("2 cuts on average") and last["met"]
    gap = (BARE - TEACHER).sum() / POSITIONS.sum() * 1.1
    assert last["value"] == pytest.approx(np.expm1(gap * (0.12 - 0.10 + 0.16 - 0.20) / 2))
    others = [{**row, "checkpoint": "n", "text": "n"} if "text" in row else {**row, "checkpoint": "n"} for row in first]
    *_, last = bars(Results(first + second + others))
    assert last["value"] == pytest.approx(np.expm1(gap * ((0.02 - 0.04) / 2 + 0.02) / 2)) and not last["met"]


def test_a_domain_that_was_left_out_is_judged_by_itself() -> None:
    rows = _rows({"reap": 0.05})
    for row in [row for row in rows if "losses" in row]:
        damage = np.where(TEXT.domain == 0, 1.5, 0.1) if row["method"] == "distill" else 1.0
        rows.append({**row, "without": "code", "losses": (TEACHER + (BARE - TEACHER) * damage).tolist()})
    results = Results(rows)
    unseen = bars(results)[-1]
    assert unseen["name"].startswith("m, code unseen") and not unseen["met"] and unseen["value"] > 0
    assert "m, without code" in unseen_table(results) and unseen_table(Results(_rows({"reap": 0.05}))) == ""


def test_tables_have_every_criterion_and_only_what_was_calibrated_on_all() -> None:
    told = tables(Results(_rows({"reap": 0.05, "gate": 0.5})))
    assert told.count("\n| reap |") == told.count("\n| gate |") == 1
    assert "25.0% bare | 25.0% distill" in told and "mean of 3 seeds" in told
