"""What is reported, from sums written by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesurgeon.evaluation.figures import figures_of, is_interval_end
from moesurgeon.evaluation.measure import AGREEMENT, EDGES, ESAP, KL, LOSS, TEACHER_LOSS, Measurement
from moesurgeon.evaluation.summary import bootstrap, expected_report, possible_report, summarise
from moesurgeon.traces.windows import Window


def _seeded() -> np.random.Generator:
    return np.random.default_rng(3)


def _measurement(
    domain: Any, document: Any, positions: Any, sums: np.ndarray, *, has_teacher: bool = True, **changes: Any
) -> Measurement:
    """Measured windows, each in one bucket."""
    domain, document, positions = (np.asarray(values, dtype=np.int64) for values in (domain, document, positions))
    fields = {
        "domains": tuple(f"d{number}" for number in range(domain.max() + 1)),
        "buckets": np.concatenate([sums, positions[:, None]], axis=1)[:, None],
        "tokens_per_second": 2.0,
        "tokens": int(positions.sum()) + len(positions),
        "has_teacher": has_teacher,
    }
    return Measurement(domain=domain, document=document, **(fields | changes))  # type: ignore[arg-type]


def _random(windows: int, seed: int = 3) -> Measurement:
    """Windows of 8 to 60 predicted tokens, of two domains, two to a document."""
    random, number = np.random.default_rng(seed), np.arange(windows)
    positions = random.integers(8, 60, windows)
    sums = random.uniform(0.5, 3.0, (windows, 5)) * positions[:, None]
    return _measurement(number % 2, number // 4, positions, sums)


def test_losses_are_weighted_by_tokens() -> None:
    # 10 tokens at a loss of 1 and 90 at a loss of 3: 2.8, not 2.
    sums = np.zeros((2, 5))
    sums[:, LOSS] = 10 * 1.0, 90 * 3.0
    report = summarise(_measurement([0, 0], [0, 1], [10, 90], sums, has_teacher=False))
    assert report["loss"] == pytest.approx(2.8, rel=1e-12)
    assert report["perplexity"] == pytest.approx(np.exp(2.8), rel=1e-12)
    assert report["tokens"] == 100
    assert report["tokens_per_second"] == 2.0
    assert report["documents"] == 2
    assert "against" not in report
    assert set(report["domains"]) == {"d0"}


def test_every_figure_is_a_sum_by_a_count() -> None:
    measured = _random(24)
    report = summarise(measured)
    chosen = {"all": measured.domain >= 0, "d0": measured.domain == 0, "d1": measured.domain == 1}
    for name, rows in chosen.items():
        sums, count = measured.sums[rows].sum(axis=0), measured.positions[rows].sum()
        own = report if name == "all" else report["domains"][name]
        against = report["against"] if name == "all" else report["against"]["domains"][name]
        assert own["tokens"] == count
        assert own["loss"] == pytest.approx(sums[LOSS] / count, rel=1e-12)
        assert own["perplexity"] == pytest.approx(np.exp(sums[LOSS] / count), rel=1e-12)
        assert against["loss"] == pytest.approx(sums[TEACHER_LOSS] / count, rel=1e-12)
        assert against["kl"] == pytest.approx(sums[KL] / count, rel=1e-12)
        assert against["agreement"] == pytest.approx(sums[AGREEMENT] / count, rel=1e-12)
        assert against["esap"] == pytest.approx(sums[ESAP] / count, rel=1e-12)
        ratio = np.exp(sums[LOSS] / count) / np.exp(sums[TEACHER_LOSS] / count)
        assert against["perplexity_ratio"] == pytest.approx(ratio, rel=1e-12)
    rise = measured.sums[:, LOSS] - measured.sums[:, TEACHER_LOSS]
    parts = {name: report["against"]["domains"][name]["share_of_rise"] for name in ("d0", "d1")}
    assert parts == pytest.approx({n: rise[chosen[n]].sum() / rise.sum() for n in ("d0", "d1")})


def test_without_a_rise_there_is_nothing_to_share() -> None:
    measured = _random(8)
    measured.buckets[..., TEACHER_LOSS] = measured.buckets[..., LOSS]
    report = summarise(measured)["against"]
    assert report["perplexity_ratio"] == 1.0
    assert report["interval"] == [1.0, 1.0]  # paired: the same text, no difference, no doubt
    assert [figures["share_of_rise"] for figures in report["domains"].values()] == [None, None]


def test_intervals_contain_what_they_are_of() -> None:
    report = summarise(_random(60))
    for figures in (report, *report["domains"].values()):
        assert figures["interval"][0] < figures["perplexity"] < figures["interval"][1]
    for figures in (report["against"], *report["against"]["domains"].values()):
        assert figures["interval"][0] < figures["perplexity_ratio"] < figures["interval"][1]
    assert summarise(_random(60, seed=4))["interval"] != report["interval"]


def test_the_same_sums_give_the_same_interval() -> None:
    measured = _random(20)
    assert summarise(measured) == summarise(measured)


def _width(report: dict[str, Any]) -> float:
    low, high = report["interval"]
    return float(np.log(high / low))


def test_intervals_shrink_with_documents_and_not_with_windows() -> None:
    """16 times the documents: a quarter of the width. 16 times the windows of each: the same width."""
    sums = _seeded().uniform(0.5, 3.0, (20, 5)) * 32
    positions = np.full(20, 32)
    once = _measurement(np.zeros(20), np.arange(20), positions, sums)
    documents = _measurement(np.zeros(320), np.arange(320), np.tile(positions, 16), np.tile(sums, (16, 1)))
    windows = _measurement(np.zeros(320), np.tile(np.arange(20), 16), np.tile(positions, 16), np.tile(sums, (16, 1)))
    few, many, repeated = (summarise(measured) for measured in (once, documents, windows))
    assert few["loss"] == pytest.approx(many["loss"]) == pytest.approx(repeated["loss"])
    assert (few["documents"], many["documents"], repeated["documents"]) == (20, 320, 20)
    assert 1 / 6 < _width(many) / _width(few) < 1 / 3
    assert repeated["interval"] == pytest.approx(few["interval"], rel=1e-9)
    assert repeated["against"]["interval"] == pytest.approx(few["against"]["interval"], rel=1e-9)


def test_documents_of_two_domains_are_two_documents_whatever_their_numbers() -> None:
    measured = _measurement([0, 0, 1, 1], [0, 1, 0, 1], [10] * 4, np.ones((4, 5)))
    report = summarise(measured)
    assert report["documents"] == 4
    assert [figures["documents"] for figures in report["domains"].values()] == [2, 2]


def test_one_document_gives_no_interval() -> None:
    report = summarise(_measurement([0, 0], [7, 7], [10, 20], np.array([[10.0] * 5, [50.0] * 5])))
    assert report["perplexity"] == pytest.approx(np.exp(2.0))
    unknown = [None, None]
    assert report["interval"] == report["domains"]["d0"]["interval"] == unknown
    assert report["against"]["interval"] == report["against"]["domains"]["d0"]["interval"] == unknown
    assert report["lengths"]["0-127"]["interval"] == report["lengths"]["0-127"]["ratio_interval"] == unknown
    assert bootstrap(np.array([10.0]), np.array([5.0])) is None


def test_one_document_of_each_of_two_domains_gives_an_interval_of_the_whole_alone() -> None:
    report = summarise(_measurement([0, 1], [0, 0], [10, 20], np.array([[10.0] * 5, [50.0] * 5])))
    assert None not in report["interval"]
    assert [figures["interval"] for figures in report["domains"].values()] == [[None, None]] * 2


@pytest.mark.parametrize("has_teacher", [False, True])
def test_what_is_expected_of_a_text_is_what_comes(has_teacher: bool) -> None:
    """Same figures, and the same of them without a value."""
    sizes = [[(0, 200), (1, 8)], [(0, 300), (0, 129), (0, 9)]]  # (document, tokens) by domain
    windows = [
        Window(f"d{number}", document, 0, np.zeros(tokens, np.int32))
        for number, rows in enumerate(sizes)
        for document, tokens in rows
    ]
    expected = expected_report(windows, ["d0", "d1"], has_teacher=has_teacher)
    buckets = _seeded().uniform(1, 2, (5, 3, 6))
    buckets[..., 5] = [[128, 71, 0], [7, 0, 0], [128, 128, 43], [128, 0, 0], [8, 0, 0]]
    buckets[buckets[..., 5] == 0] = 0
    domain = [int(window.domain[1]) for window in windows]
    document = [window.document for window in windows]
    measured = _measurement(domain, document, [1] * 5, np.ones((5, 5)), buckets=buckets, has_teacher=has_teacher)
    mine, real = figures_of(expected), figures_of(summarise(measured))
    ends = [path for path in real if is_interval_end(path)]
    assert mine.keys() == real.keys() and len(ends) > 10
    assert {path for path in ends if mine[path] is None} == {path for path in ends if real[path] is None} != set()
    assert expected["tokens"] == summarise(measured)["tokens"] == 641


@settings(deadline=None, max_examples=30)  # a thousand resamples each
@given(st.lists(st.tuples(st.floats(0.1, 100.0), st.integers(1, 500)), min_size=2, max_size=30))
def test_the_bootstrap_stays_between_the_extreme_documents(values: list[tuple[float, int]]) -> None:
    sums, counts = np.array(values, dtype=float).T
    found = bootstrap(sums, counts)
    assert found is not None
    low, high = found
    assert (sums / counts).min() - 1e-9 <= low <= high <= (sums / counts).max() + 1e-9


def test_the_bootstrap_covers_what_it_claims() -> None:
    """Of samples from a known distribution about 95 % have the true mean in their interval."""
    truth, inside, random = 2.0, 0, _seeded()
    for _ in range(150):
        # Gamma with mean 2: skewed, as losses of documents are; lengths vary independently.
        counts = random.integers(20, 200, 40).astype(float)
        sums = random.gamma(4.0, truth / 4.0, 40) * counts
        found = bootstrap(sums, counts)
        assert found is not None
        low, high = found
        inside += low <= truth <= high
    assert 0.85 <= inside / 150 <= 0.99


def test_buckets_are_documents_of_their_own() -> None:
    """The window counts in every bucket that it reaches, and intervals are over the documents that reach it."""
    random = _seeded()
    buckets = random.uniform(1.0, 2.0, (30, 6, 6)) * 100
    buckets[..., 5] = random.integers(1, 5, (30, 6))
    buckets[20:, 4:] = 0  # ten windows are shorter
    buckets[1:, 5] = 0  # one is longer than all others
    document = np.arange(30) // 2
    measured = _measurement(np.zeros(30), document, np.ones(30), np.ones((30, 5)), buckets=buckets)
    lengths = summarise(measured)["lengths"]
    assert list(lengths) == ["0-127", "128-255", "256-511", "512-1023", "1024-2047", "2048-4095"]
    assert [figures["documents"] for figures in lengths.values()] == [15, 15, 15, 15, 10, 1]
    for number, figures in enumerate(lengths.values()):
        part = buckets[:, number].sum(axis=0)
        assert figures["tokens"] == part[5]
        assert figures["loss"] == pytest.approx(part[LOSS] / part[5], rel=1e-12)
        assert figures["perplexity"] == pytest.approx(np.exp(part[LOSS] / part[5]), rel=1e-12)
        ratio = np.exp((part[LOSS] - part[TEACHER_LOSS]) / part[5])
        assert figures["perplexity_ratio"] == pytest.approx(ratio, rel=1e-12)
        for value, interval in (("perplexity", "interval"), ("perplexity_ratio", "ratio_interval")):
            low, high = figures[interval]
            assert low < figures[value] < high if number < 5 else (low, high) == (None, None)
    chosen = buckets[:, 4].reshape(15, 2, 6).sum(axis=1)[:10]
    rises = chosen[:, LOSS] - chosen[:, TEACHER_LOSS]
    found = bootstrap(rises, chosen[:, 5])
    assert found is not None
    assert lengths["1024-2047"]["ratio_interval"] == pytest.approx(np.exp(found))
    whole = summarise(measured)
    assert whole["tokens"] == sum(figures["tokens"] for figures in lengths.values())


def test_without_a_teacher_buckets_have_no_ratio() -> None:
    report = summarise(_measurement([0], [0], [10], np.ones((1, 5)), has_teacher=False))
    assert set(report["lengths"]["0-127"]) == {"tokens", "documents", "loss", "perplexity", "interval"}


def test_there_is_a_bucket_for_every_context() -> None:
    """DeepSeek-V3 has a context of 163,840 tokens, others of a million."""
    assert EDGES[:5] == (0, 128, 256, 512, 1024)
    assert all(high == 2 * low for low, high in itertools.pairwise(EDGES[1:]))
    assert EDGES[-1] > 8_000_000


def test_empty_buckets_are_left_out() -> None:
    buckets = np.zeros((1, 4, 6))
    buckets[0, 2] = 1.0
    measured = _measurement([0], [0], [10], np.ones((1, 5)), buckets=buckets)
    assert list(summarise(measured)["lengths"]) == ["256-511"]


@pytest.mark.parametrize("has_teacher", [False, True])
@pytest.mark.parametrize(("length", "buckets"), [(8, 1), (129, 1), (130, 2), (512, 3), (513, 3), (514, 4)])
def test_what_is_possible_is_what_comes(length: int, buckets: int, has_teacher: bool) -> None:
    sums = _seeded().uniform(1, 2, (2, buckets, 6))
    sums[..., 5] = 1
    measured = _measurement([0, 1], [0, 0], [1, 1], np.ones((2, 5)), buckets=sums, has_teacher=has_teacher)
    possible = possible_report(["d0", "d1"], length=length, has_teacher=has_teacher)
    assert figures_of(possible).keys() == figures_of(summarise(measured)).keys()
