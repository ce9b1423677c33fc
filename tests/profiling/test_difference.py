"""Before and after: what moved, and what is chance."""

from __future__ import annotations

import numpy as np
import pytest

from moesurgeon.profiling.difference import difference, discoveries
from moesurgeon.profiling.statistics import Statistics, normalised_entropy
from tests.profiling.made import Made, random_documents, statistics_of

EVEN = np.full((2, 6), 1 / 6)


def _made(share: np.ndarray, seed: int, count: int = 60) -> Statistics:
    random = np.random.default_rng(seed)
    return statistics_of([m for d in ("code", "chat") for m in random_documents(random, share, count, domain=d)])


def test_a_profile_is_no_different_from_itself() -> None:
    statistics = _made(EVEN, 0)
    found = difference(statistics, statistics, None)
    assert (found["significant"], found["compared"]) == (0, 12)
    for layer in found["layers"].values():
        assert layer["total_variation"] == 0 and layer["domains"] == {"code": 0, "chat": 0}
        assert layer["entropy"][0] == layer["entropy"][1]


def test_chance_is_hardly_ever_called_a_change() -> None:
    """Text of one kind, twice, 40 times: one discovery in such a pair is false, in about 5 % of the pairs."""
    pairs = [difference(_made(EVEN, 2 * seed), _made(EVEN, 2 * seed + 1), None) for seed in range(40)]
    assert sum(pair["significant"] > 0 for pair in pairs) <= 7


def test_figures_are_those_of_their_definitions() -> None:
    before, after = _made(EVEN, 0), _made(np.array([[0.3, 0.1, 0.15, 0.15, 0.15, 0.15], [1 / 6] * 6]), 1)
    found = difference(before, after, None)
    old, new = before.utilization(), after.utilization()
    for row, layer in enumerate(("0", "1")):
        figures = found["layers"][layer]
        moved = sum(max(0.0, b - a) for a, b in zip(old[row], new[row], strict=True))
        assert figures["total_variation"] == pytest.approx(moved)
        assert figures["entropy"] == pytest.approx([normalised_entropy(old[row]), normalised_entropy(new[row])])
        assert figures["max_over_mean"] == pytest.approx([old[row].max() * 6, new[row].max() * 6])
        changes = [abs(expert["change"]) for expert in figures["experts"]]
        assert changes == sorted(changes, reverse=True)
        for expert in figures["experts"]:
            assert expert["share"] == pytest.approx([old[row, expert["expert"]], new[row, expert["expert"]]])
    changed = {expert["expert"] for expert in found["layers"]["0"]["experts"] if expert["significant"]}
    assert changed >= {0, 1}
    assert not any(expert["significant"] for expert in found["layers"]["1"]["experts"])


def test_what_was_pruned_is_compared_by_its_old_number() -> None:
    before = statistics_of([Made("text", 100, np.array([[40.0, 10.0, 30.0, 20.0]]), fold=n) for n in range(9)])
    after = statistics_of([Made("text", 100, np.array([[50.0, 30.0, 20.0]]), fold=n) for n in range(9)])
    figures = difference(before, after, {0: (0, 2, 3)})["layers"]["0"]
    experts = {expert["expert"]: expert for expert in figures["experts"]}
    assert [experts[e]["after"] for e in range(4)] == [0, None, 1, 2]
    assert [experts[e]["share"] for e in range(4)] == [[0.4, 0.5], [0.1, 0.0], [0.3, 0.3], [0.2, 0.2]]
    assert figures["total_variation"] == pytest.approx(0.1)
    assert figures["domains"] == {"text": pytest.approx(0.1)}
    assert [experts[e]["significant"] for e in range(4)] == [True, False, False, False]  # no document differs
    assert figures["max_over_mean"] == pytest.approx([1.6, 1.5])


def test_counts_alone_are_compared_without_errors() -> None:
    before, after = (Statistics.empty(("served",), (0,), 2, 1) for _ in range(2))
    before.sums["tokens"][0, 0, 0], after.sums["tokens"][0, 0, 0] = (90.0, 10.0), (10.0, 90.0)
    found = difference(before, after, None)
    assert found["layers"]["0"]["total_variation"] == pytest.approx(0.8)
    assert found["significant"] == 0
    assert all(expert["error"] is None for expert in found["layers"]["0"]["experts"])


def test_discoveries_are_benjamini_s_and_hochberg_s() -> None:
    # Table 1 of their paper: 15 probabilities, of which the first four are discoveries at 5 %.
    chance = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344,
              0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000]  # fmt: skip
    assert discoveries(np.array(chance)).tolist() == [True] * 4 + [False] * 11
    assert discoveries(np.array(chance[::-1])).sum() == 4
    assert discoveries(np.array([])).tolist() == []
    assert not discoveries(np.ones(5)).any()
