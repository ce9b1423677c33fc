"""Hidden units that are found again in another order, and pairings against plain ones in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moesurgeon.healing.align import Units, aligned, cheapest, similarities

WIDTH, HIDDEN = 48, 20


def _units(seed: int, inputs: torch.Tensor) -> Units:
    draw = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(2 * WIDTH, HIDDEN, generator=draw)
    gate, up = (inputs @ gate_up.T).chunk(2, -1)
    return Units(gate_up, torch.randn(HIDDEN, WIDTH, generator=draw), torch.nn.functional.silu(gate) * up)


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(9))


def _shuffled(units: Units, order: torch.Tensor, sign: torch.Tensor) -> Units:
    """Return the same function with unit a at order[a], up and down projection of it times sign[a]."""
    back = order.argsort()
    gate, up = units.gate_up.chunk(2)
    turned = sign[:, None]
    return Units(
        torch.cat([gate[back], (up * turned)[back]]), (units.down * sign)[:, back], (units.activations * sign)[:, back]
    )


def test_a_shuffled_copy_is_found_exactly(inputs: torch.Tensor) -> None:
    one = _units(1, inputs)
    draw = torch.Generator().manual_seed(3)
    order = torch.randperm(WIDTH, generator=draw)
    sign = torch.where(torch.rand(WIDTH, generator=draw) < 0.5, -1.0, 1.0)
    found, turned = aligned(one, _shuffled(one, order, sign))
    assert torch.equal(found, order) and torch.equal(turned, sign)


def test_similarity_is_the_better_sign_of_both_cosines(inputs: torch.Tensor) -> None:
    one, other = _units(1, inputs), _units(2, inputs)
    found, sign = similarities(one, other)
    for a in range(0, WIDTH, 7):
        for b in range(WIDTH):
            choices = []
            for turn in (1.0, -1.0):
                parts = []
                for units, unit, factor in ((one, a, 1.0), (other, b, turn)):
                    gate, up = (part[unit].double() for part in units.gate_up.chunk(2))
                    weights = torch.cat([gate, factor * up, factor * units.down[:, unit].double()])
                    parts.append((weights, factor * units.activations[:, unit].double()))
                cosines = [float(x @ y / x.norm() / y.norm()) for x, y in zip(*parts, strict=True)]
                choices.append(sum(cosines))
            assert float(found[a, b]) == pytest.approx(max(choices), abs=1e-5)
            assert float(sign[a, b]) == (1.0 if choices[0] >= choices[1] else -1.0)


def test_a_dead_unit_is_like_none(inputs: torch.Tensor) -> None:
    one, other = _units(1, inputs), _units(2, inputs)
    other.gate_up[[5, WIDTH + 5]] = 0
    other.down[:, 5] = 0
    other.activations[:, 5] = 0
    found, _sign = similarities(one, other)
    assert found.isfinite().all() and (found[:, 5] == 0).all()
    order, _sign = aligned(one, other)
    assert sorted(order.tolist()) == list(range(WIDTH))


def test_without_exactness_it_is_the_greedy_choice() -> None:
    cost = np.random.default_rng(4).standard_normal((60, 60))
    left, expected = cost.copy(), np.empty(60, np.int64)
    for _pair in range(60):
        row, column = np.unravel_index(left.argmin(), left.shape)
        expected[row] = column
        left[row], left[:, column] = np.inf, np.inf
    assert np.array_equal(cheapest(cost, 0), expected)


@pytest.mark.parametrize("exact", [1, 20, 59, 60, 61])
def test_every_unit_is_paired_once(exact: int) -> None:
    cost = np.random.default_rng(4).standard_normal((60, 60))
    rows, columns = linear_sum_assignment(cost)
    found = cheapest(cost, exact)
    assert sorted(found) == list(range(60))
    if exact >= 60:
        assert np.array_equal(found[rows], columns)


def test_the_more_is_exact_the_cheaper() -> None:
    """On average: 20 tables of costs."""
    totals = []
    for exact in (0, 30, 60):
        tables = [np.random.default_rng(seed).standard_normal((60, 60)) for seed in range(20)]
        totals.append(sum(cost[np.arange(60), cheapest(cost, exact)].sum() for cost in tables))
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[1] > totals[2]


def test_ties_are_paired() -> None:
    for exact in (0, 2, 9):
        assert sorted(cheapest(np.ones((9, 9)), exact)) == list(range(9))
    assert cheapest(np.ones((0, 0))).tolist() == []
