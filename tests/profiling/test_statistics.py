from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.profiling.statistics import (
    PEAK,
    PER_EXPERT,
    Statistics,
    capacities_of,
    gini,
    normalised_entropy,
    shapes_of,
    shares,
    variation,
)

LAYERS, EXPERTS = (1, 3), 4
WHOLE = (*PER_EXPERT, "seen", "documents")


def _random(domains: tuple[str, ...], seed: int) -> Statistics:
    random = np.random.default_rng(seed)
    statistics = Statistics.empty(domains, LAYERS, EXPERTS, 2)
    for name, array in statistics.sums.items():
        array[...] = random.integers(1, 1000, array.shape) if name in WHOLE else random.uniform(size=array.shape)
    return statistics


def _assert_equal(left: Statistics, right: Statistics) -> None:
    assert left.domains == right.domains
    for name in left.sums:
        np.testing.assert_allclose(left.sums[name], right.sums[name], rtol=1e-12, err_msg=name)


# What changes its shape with the number of domains.
BY_DOMAIN = {name for name, shape in shapes_of(7, 2, 4, 2).items() if shape != shapes_of(8, 2, 4, 2)[name]}
DOMAINS = st.lists(st.sampled_from("abcd"), unique=True, min_size=1).map(tuple)


@given(DOMAINS, DOMAINS, DOMAINS)
def test_merging_is_adding_up_domain_by_domain(
    first: tuple[str, ...], second: tuple[str, ...], third: tuple[str, ...]
) -> None:
    one, two, three = (_random(domains, seed) for seed, domains in enumerate((first, second, third)))
    both = one.merged(two)
    assert both.domains == tuple(dict.fromkeys((*one.domains, *two.domains)))
    for number, domain in enumerate(both.domains):
        having = [(part, part.domains.index(domain)) for part in (one, two) if domain in part.domains]
        assert both.seen[number] == sum(part.seen[row] for part, row in having)
        for name in BY_DOMAIN:
            rows = [part.sums[name][row] for part, row in having]
            expected = np.max(rows, axis=0) if name == PEAK else np.sum(rows, axis=0)
            assert np.array_equal(both.sums[name][number], expected)
    for name in set(both.sums) - BY_DOMAIN:  # what has no domain
        assert np.array_equal(both.sums[name], one.sums[name] + two.sums[name])
    _assert_equal(one.merged(two).merged(three), one.merged(two.merged(three)))
    _assert_equal(one.merged(Statistics.empty((), LAYERS, EXPERTS, 2)), one)


def test_merging_changes_neither_part() -> None:
    one, two = _random(("a",), 1), _random(("a", "b"), 2)
    one.merged(two).sums["tokens"][:] = -1
    _assert_equal(one, _random(("a",), 1))
    _assert_equal(two, _random(("a", "b"), 2))


def test_totals_are_over_domains_and_positions() -> None:
    statistics = _random(("a", "b", "c"), 5)
    for name in (*PER_EXPERT, PEAK, "entropy", "margin"):
        array = statistics.sums[name]
        together = np.max if name == PEAK else np.sum
        np.testing.assert_allclose(statistics.total(name), together(array, axis=(0, 1)), rtol=1e-14)
        np.testing.assert_allclose(statistics.by_domain(name), together(array, axis=1), rtol=1e-14)
        np.testing.assert_allclose(statistics.by_position(name), together(array, axis=0), rtol=1e-14)
    assert statistics.seen.tolist() == [row.sum() for row in statistics.sums["seen"]]


def test_shares_add_up_to_one_also_where_nothing_was_counted() -> None:
    counts = np.array([[1.0, 3.0, 0.0, 0.0], [0.0] * 4])
    assert shares(counts).tolist() == [[0.25, 0.75, 0.0, 0.0], [0.25] * 4]
    assert Statistics.empty(("a",), LAYERS, EXPERTS, 2).utilization().tolist() == [[0.25] * 4] * 2


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=16))
def test_entropy_is_between_one_expert_and_even_use(counts: list[float]) -> None:
    share = shares(np.array(counts))
    entropy = float(normalised_entropy(share))
    plain = -sum(p * np.log(p) for p in share if p > 0) / np.log(max(2, len(share)))
    assert entropy == pytest.approx(plain, abs=1e-12)
    assert 0.0 <= entropy <= 1.0 + 1e-12


def test_entropy_of_the_extremes() -> None:
    assert normalised_entropy(np.full(8, 1 / 8)) == pytest.approx(1.0)
    single = normalised_entropy(np.array([0.0, 1.0, 0.0]))
    assert (single, np.signbit(single)) == (0.0, False)
    assert normalised_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).tolist() == pytest.approx([0.0, 1.0])


@given(st.lists(st.integers(0, 50), min_size=2, max_size=12))
def test_gini_and_variation_are_those_of_their_definitions(counts: list[int]) -> None:
    share = shares(np.array(counts, dtype=float))
    mean = sum(share) / len(share)
    pairs = sum(abs(a - b) for a in share for b in share) / len(share) ** 2
    assert float(gini(share)) == pytest.approx(pairs / (2 * mean), abs=1e-12)
    spread = sum((a - mean) ** 2 for a in share) / len(share)
    assert float(variation(share)) == pytest.approx(spread**0.5 / mean, abs=1e-12)


def test_capacity_is_deepspeed_s() -> None:
    cases = ((1024, 8, 1.0), (1000, 16, 1.25), (10, 8, 1.0))
    assert [float(capacities_of(np.array(choices), *rest)) for choices, *rest in cases] == [128, 79, 4]


def test_a_server_s_counts_are_told_from_a_profile() -> None:
    statistics = Statistics.empty(("a",), LAYERS, EXPERTS, 2)
    assert not statistics.counts_only
    statistics.sums["tokens"][...] = 1.0
    assert statistics.counts_only
    statistics.sums["weight"][0, 0, 0, 0] = 0.5
    assert not statistics.counts_only
