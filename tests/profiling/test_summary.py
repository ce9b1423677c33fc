"""What a profile says in words and figures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesurgeon.profiling.dispatch import add_dispatches
from moesurgeon.profiling.rows import COLUMNS, coldest, experts_of, spreadsheet
from moesurgeon.profiling.statistics import PEAK, PER_EXPERT, Statistics
from moesurgeon.profiling.summary import niches_of, summary_of
from tests.profiling.made import Made, random_documents, statistics_of

SHARE = np.array([[0.3, 0.3, 0.2, 0.15, 0.05]])


@pytest.fixture
def niche() -> Statistics:
    """Expert 4 has 2 % of the traffic, nearly all of it in one of ten domains; expert 3 is rare everywhere."""
    documents = [Made(f"d{n}", 2000, np.array([[900.0, 600.0, 470.0, 30.0, 0.0]]), fold=n) for n in range(9)]
    return statistics_of([*documents, Made("rare", 2000, np.array([[700.0, 500.0, 370.0, 30.0, 400.0]]))])


def test_niches_are_found(niche: Statistics) -> None:
    (found,) = niches_of(niche, 0)
    assert (found["expert"], found["kind"], found["where"]) == (4, "domain", "rare")
    assert found["times"] == pytest.approx((400 / 2000) / (400 / 20000))
    warnings = summary_of(niche)["warnings"]
    assert "layer 0: expert 4 was cold on average, but hot for some text" in warnings


def test_a_niche_in_long_context_is_found(niche: Statistics) -> None:
    niche.sums["seen"][0, 3] = 1000.0
    niche.sums["tokens"][0, 3, 0] = [400.0, 300.0, 100.0, 200.0, 0.0]
    assert ("position", "8192-32767", 3) in [(n["kind"], n["where"], n["expert"]) for n in niches_of(niche, 0)]


def test_few_tokens_make_no_niche(niche: Statistics) -> None:
    for name in ("tokens", "first_choice"):
        niche.sums[name][9, 0, 0, 4] = 99.0
    assert niches_of(niche, 0) == []


def test_experts_under_a_hundred_tokens_are_flagged_and_not_called_cold() -> None:
    statistics = statistics_of([Made("text", 1000, np.array([[801.0, 100.0, 99.0, 0.0]]))])
    summary = summary_of(statistics)
    figures = summary["layers"]["0"]
    assert (figures["low_support"], figures["never_routed"]) == ([2], [3])
    said = " ".join(summary["warnings"])
    assert "expert 2 was given under 100 tokens; too few to judge" in said
    assert "expert 3 was never routed to; that is not proof of no use" in said
    assert "cold" not in said


def test_a_collapsed_layer_is_said() -> None:
    tokens = np.array([[9800.0, 200.0, 200.0, 200.0, 200.0], [2000.0] * 5])
    summary = summary_of(statistics_of([Made("text", 10600, tokens)]))
    (warning,) = (said for said in summary["warnings"] if "collapsed" in said)
    assert warning.startswith("layer 0 is collapsed")


def test_a_summary_is_json_with_intervals_that_hold_the_shares() -> None:
    statistics = statistics_of(random_documents(np.random.default_rng(0), SHARE, 30))
    figures = json.loads(json.dumps(summary_of(statistics), allow_nan=False))["layers"]["0"]
    assert sum(figures["utilization"]) == pytest.approx(1.0)
    for share, (low, high) in zip(figures["utilization"], figures["interval"], strict=True):
        assert 0 <= low < share < high


def test_of_counts_alone_nothing_is_said_that_is_not_known() -> None:
    statistics = Statistics.empty(("served",), (0,), 4, 2)
    statistics.sums["tokens"][0, 0, 0] = [600.0, 300.0, 100.0, 0.0]
    statistics.sums["seen"][0, 0] = 500.0
    summary = summary_of(statistics)
    assert summary["counts_only"] and summary["positions"] == {} and summary["documents"] == 0
    figures = summary["layers"]["0"]
    assert figures["utilization"] == [0.6, 0.3, 0.1, 0.0]
    assert figures["interval"] == [[0.0, None]] * 4
    assert not figures.keys() & {"reap", "gate_mass", "first_choice", "router_entropy", "router_margin"}
    (expert, *_) = experts_of(statistics, 0)
    assert (expert["expert"], expert["gate_mass"], expert["reap"]) == (0, None, None)


def test_overflow_is_read_off_the_dispatches() -> None:
    statistics = statistics_of([Made("text", 512, np.array([[300.0, 100.0, 100.0, 12.0]]))])
    load = np.array([[300.0, 100.0, 100.0, 12.0]])
    add_dispatches(statistics, 0, [512], (load, load))
    overflow = summary_of(statistics)["layers"]["0"]["overflow"]
    assert list(overflow) == ["512"]
    gate = overflow["512"]["as_is"]
    assert gate == overflow["512"]["top_1"]
    assert gate["dropped"]["1"] == pytest.approx((300 - 128) / 512)
    assert gate["dropped"]["1.5"] == pytest.approx((300 - 192) / 512)
    assert gate["idle"]["1"] == pytest.approx(1 - (512 - 172) / 512)
    assert gate["max_over_mean"] == pytest.approx(300 / 128)
    assert gate["padding_in_blocks"] == pytest.approx((384 + 128 + 128 + 128) / 512 - 1)


def test_a_window_of_many_dispatches_does_not_pass_for_one() -> None:
    statistics = statistics_of([Made("text", 4096, np.array([[4000.0, 96.0]]))])
    load = np.array([[4000.0, 96.0]])
    add_dispatches(statistics, 0, [4096], (load, load))
    counts = statistics.sums["dispatch"][0, :, 0, 0]
    assert counts.tolist() == [0.0, 1.0, 1.0]  # of 2048 to 4096 tokens, and of half of 8192


def test_rows_hold_every_sum_and_each_interval() -> None:
    random = np.random.default_rng(3)
    statistics = statistics_of(
        [made for domain in ("code", "chat") for made in random_documents(random, SHARE, 10, domain=domain)]
    )
    statistics.sums["seen"][1, 2] = 64.0
    statistics.sums["tokens"][1, 2, 0] = [32.0, 16.0, 16.0, 0.0, 0.0]
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in spreadsheet(statistics)]
    assert [(row["domain"], row["position"], row["expert"]) for row in rows] == [
        (domain, position, expert)
        for domain, position in (("code", "0-511"), ("chat", "0-511"), ("chat", "2048-8191"))
        for expert in range(5)
    ]
    place = {"code": 0, "chat": 1}, {"0-511": 0, "2048-8191": 2}
    for row in rows:
        at = place[0][row["domain"]], place[1][row["position"]], 0, row["expert"]
        assert [row[name] for name in (*PER_EXPERT, PEAK)] == [
            statistics.sums[name][at] for name in (*PER_EXPERT, PEAK)
        ]
        assert row["domain_low"] <= row["domain_share"] <= row["domain_high"]
        assert row["all_low"] <= row["all_share"] <= row["all_high"]
        assert row["all_share"] == pytest.approx(statistics.utilization()[0, row["expert"]])
    for name in ("tokens", "weight"):
        assert sum(row[name] for row in rows) == pytest.approx(statistics.sums[name].sum())


def test_the_coldest_are_told_with_whom_they_serve(niche: Statistics) -> None:
    first, second = coldest(niche, 0, 2)
    assert [first["expert"], second["expert"]] == [3, 4]
    assert second["serves"] == {"domain": "rare", "share": pytest.approx(0.2)}
    niche.sums["tokens"][:, :, 0, 3] = 0.0
    assert coldest(niche, 0, 1)[0]["serves"] is None
    assert [each["expert"] for each in experts_of(niche, 0)] == [0, 1, 2, 4, 3]
