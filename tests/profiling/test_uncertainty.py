"""Errors over documents: against the formula written out, and against what repeating the experiment gives."""

from __future__ import annotations

import numpy as np
import pytest

from moesurgeon.profiling.statistics import Statistics
from moesurgeon.profiling.uncertainty import (
    SUPPORT,
    has_support,
    interval,
    per_routed_token,
    per_token,
    utilization,
)
from tests.profiling.made import Made, random_documents, statistics_of

SHARE = np.array([[0.4, 0.3, 0.2, 0.09, 0.01], [0.2] * 5])


@pytest.fixture
def documents() -> list[Made]:
    random = np.random.default_rng(1)
    return [
        Made(made.domain, made.length, made.tokens, made.fold, random.uniform(0.5, 2, SHARE.shape))
        for domain in ("code", "chat")
        for made in random_documents(random, SHARE, 7, domain=domain, top_k=2)
    ]


def _plain(x: list[float], n: list[float]) -> tuple[float, float]:
    """Return sum x / sum n and its standard error, residual by residual."""
    ratio = sum(x) / sum(n)
    residuals = [a - ratio * b for a, b in zip(x, n, strict=True)]
    variance = len(x) / (len(x) - 1) * sum(r * r for r in residuals) / sum(n) ** 2
    return ratio, variance**0.5


@pytest.mark.parametrize("domain", [None, "code"])
@pytest.mark.parametrize("name", ["tokens", "weight", "norm", "weighted_norm"])
def test_errors_are_those_of_the_formula(name: str, domain: str | None, documents: list[Made]) -> None:
    statistics = statistics_of(documents, top_k=2)
    mine = [made for made in documents if domain in (None, made.domain)]
    for layer in range(2):
        for expert in range(5):
            x = [float(made.sums()[name][layer, expert]) for made in mine]
            lengths, routed = [made.length for made in mine], [float(made.tokens[layer, expert]) for made in mine]
            for estimate, n in ((per_token, lengths), (per_routed_token, routed)):
                found = estimate(statistics, name, domain)
                value, error = _plain(x, n)
                assert found.value[layer, expert] == pytest.approx(value, rel=1e-12)
                assert found.error[layer, expert] == pytest.approx(error, rel=1e-6, abs=1e-9)
    share = utilization(statistics, domain)
    np.testing.assert_allclose(share.value, per_token(statistics, "tokens", domain).value / 2, rtol=1e-12)
    np.testing.assert_allclose(share.value.sum(axis=1), 1.0, rtol=1e-12)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """400 profiles of 60 documents, whose tokens resemble each other; errors over tokens would be far too small."""
    random, hits, naive = np.random.default_rng(5), [], []
    for _ in range(400):
        statistics = statistics_of(random_documents(random, SHARE, 60))
        estimate = utilization(statistics)
        low, high = interval(estimate)
        hits.append((low <= SHARE) & (high >= SHARE))
        alone = 1.96 * np.sqrt(estimate.value * (1 - estimate.value) / statistics.seen.sum())
        naive.append(np.abs(estimate.value - SHARE) <= alone)
    covered = np.mean(hits, axis=0)
    assert (covered[SHARE > 0.05] > 0.91).all() and (covered[SHARE > 0.05] < 0.98).all()
    assert covered[0, 4] > 0.8  # a rare expert's error is less normal
    assert np.mean(naive) < 0.6


def test_one_document_tells_no_error() -> None:
    random = np.random.default_rng(0)
    statistics = statistics_of(random_documents(random, SHARE, 1))
    for estimate in (per_token(statistics, "tokens"), per_routed_token(statistics, "norm")):
        assert np.isinf(estimate.error).all()
    low, high = interval(utilization(statistics))
    assert (low == 0).all() and np.isinf(high).all()


def test_an_expert_of_a_single_document_is_not_certain() -> None:
    """Its mean over documents has no spread: that is no proof that others would say the same."""
    tokens = np.array([[[50.0, 50.0, 0.0]], [[100.0, 0.0, 0.0]], [[100.0, 0.0, 0.0]]])
    statistics = statistics_of([Made("text", 100, each, scale=2.0) for each in tokens])
    found = per_routed_token(statistics, "weighted_norm")
    assert found.value[0].tolist() == [2.0, 2.0, 0.0]
    assert np.isfinite(found.error[0, 0]) and np.isinf(found.error[0, 1:]).all()


def test_what_was_never_met_may_still_be_three_in_all_tokens() -> None:
    tokens = np.array([[100.0, 0.0]])
    statistics = statistics_of([Made("text", 100, tokens) for _ in range(30)])
    _, high = interval(utilization(statistics))
    assert high[0].tolist() == [1.0, 3 / 3000]
    doubled = statistics.weighted({"text": 2.0})  # no more is known by counting it twice
    assert interval(utilization(doubled))[1][0, 1] == pytest.approx(3 / 3000)


def test_support_is_a_hundred_tokens() -> None:
    statistics = statistics_of([Made("text", 500, np.array([[float(SUPPORT), SUPPORT - 1.0, 0.0]]))])
    assert SUPPORT == 100
    assert has_support(statistics).tolist() == [[True, False, False]]


def test_no_text_has_no_errors_of_arithmetic() -> None:
    empty = Statistics.empty(("text",), (0,), 3, 1)
    for estimate in (per_token(empty, "tokens"), per_routed_token(empty, "norm"), utilization(empty)):
        assert np.isinf(estimate.error).all() and (estimate.value == 0).all()
