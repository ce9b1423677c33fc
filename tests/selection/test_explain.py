"""Why each expert goes: figures against their definitions, tokens that move against a loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesurgeon.profiling.statistics import Statistics
from moesurgeon.profiling.uncertainty import interval, utilization
from moesurgeon.selection.choose import best
from moesurgeon.selection.criteria import scores_of
from moesurgeon.selection.explain import DESTINATIONS, explained, moved_tokens
from tests.profiling.made import profile_of, random_documents, statistics_of

SHARE = np.array([[0.3, 0.2, 0.2, 0.1, 0.1, 0.09, 0.0099, 0.0001], [0.125] * 8])


def _statistics() -> Statistics:
    random = np.random.default_rng(4)
    documents = [
        document
        for domain in ("a", "b")
        for document in random_documents(random, SHARE, 10, domain=domain, top_k=2, length=100)
    ]
    statistics = statistics_of(documents, top_k=2)
    for row in range(2):
        pairs = random.integers(0, 50, (8, 8)).astype(float)
        statistics.sums["together"][row] = pairs + pairs.T
        np.fill_diagonal(statistics.sums["together"][row], statistics.total("tokens")[row])
    return statistics


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 30))
def test_tokens_that_move(seed: int, top_k: int, tokens: int) -> None:
    random = np.random.default_rng(seed)
    before, after = (
        np.array([random.permutation(6)[:top_k] for _ in range(tokens)], dtype=np.int64).reshape(tokens, top_k)
        for _ in range(2)
    )
    expected = np.zeros((6, 6))
    for was, is_now in zip(before.tolist(), after.tolist(), strict=True):
        came = set(is_now) - set(was)
        for left in set(was) - set(is_now):
            for other in came:
                expected[left, other] += 1 / len(came)
    np.testing.assert_allclose(moved_tokens(before, after, 6), expected, atol=1e-12)


def test_every_figure_is_what_it_says() -> None:
    statistics = _statistics()
    weighted = profile_of(statistics, weights={"a": 3.0}).weighted
    scores = scores_of(weighted, "frequency")
    kept = best(scores, (0, 1), 5)
    moved = {layer: np.random.default_rng(layer).uniform(0, 9, (8, 8)) for layer in (0, 1)}
    moved[0][7] = 0.0  # nobody of the sample
    report = explained(statistics, weighted, kept, scores=scores, moved=moved)
    assert {layer: sorted(e["expert"] for e in experts) for layer, experts in report.items()} == {
        str(layer): sorted(set(range(8)) - set(stay)) for layer, stay in kept.items()
    }
    for row, (layer, experts) in enumerate(report.items()):
        assert [expert["rank"] for expert in experts] == [1, 2, 3]  # all that go, the first first
        for entry in experts:
            e = entry["expert"]
            worse = [o for o in range(8) if (scores[row, o], -o) < (scores[row, e], -e)]
            assert entry["rank"] == 1 + len(worse) and entry["value"] == scores[row, e]
            own = weighted.total("tokens")[row]
            assert entry["share"] == pytest.approx(own[e] / own.sum())
            low, high = interval(utilization(weighted))
            assert entry["interval"] == [low[row, e], high[row, e]]
            for number, domain in enumerate(("a", "b")):
                tokens = statistics.by_domain("tokens")[number, row]
                low, high = interval(utilization(statistics, domain))
                assert entry["utilization"][domain] == {
                    "share": pytest.approx(tokens[e] / tokens.sum()),
                    "interval": [low[row, e], high[row, e]],
                }
            assert entry["support"] == bool(weighted.support()[row, e] >= 100)
            together = statistics.sums["together"][row]
            others = sorted(kept[row], key=lambda o: (-together[e, o], o))[:DESTINATIONS]
            assert entry["beside"] == [{"expert": o, "share": together[e, o] / together[e, e]} for o in others]
            to = moved[int(layer)][e]
            assert entry["tokens"] == round(to.sum())
            if (int(layer), e) == (0, 7):
                assert entry["goes_to"] is None
                continue
            most = sorted(range(8), key=lambda o: -to[o])[:DESTINATIONS]
            assert [place["expert"] for place in entry["goes_to"]] == most
            assert [place["share"] for place in entry["goes_to"]] == pytest.approx(to[most] / to.sum())
    assert not report["0"][0]["support"] and report["0"][0]["expert"] == 7


def test_what_is_not_known_is_none() -> None:
    statistics = _statistics()
    report = explained(statistics, statistics, {0: range(8), 1: range(6)})
    assert report["0"] == []
    assert [(e["expert"], e["value"], e["rank"], e["goes_to"], e["tokens"]) for e in report["1"]] == [
        (6, None, None, None, None), (7, None, None, None, None)
    ]  # fmt: skip
    empty = Statistics.empty(("a",), (0,), 4, 2)
    entry = explained(empty, empty, {0: (0, 1)})["0"][0]
    assert entry["interval"] == [0.0, None] and entry["utilization"]["a"]["share"] == 0 and entry["beside"] == []
