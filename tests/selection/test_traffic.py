"""What the experts that go had of the traffic: by layer, and when it is said."""

from __future__ import annotations

import numpy as np
import pytest

from moesurgeon.profiling.statistics import Statistics
from moesurgeon.selection.traffic import MUCH, removed_traffic, traffic_warnings


def _counted(tokens: list[list[float]], top_k: int = 1) -> Statistics:
    statistics = Statistics.empty(("text",), tuple(range(len(tokens))), len(tokens[0]), top_k)
    statistics.sums["tokens"][0, 0] = tokens
    statistics.sums["seen"][0, 0] = sum(tokens[0]) / top_k
    return statistics


def test_shares_are_those_of_tokens_and_of_all_that_was_routed() -> None:
    """At top-2 the shares of the experts add up to two, and an even one is 2 / E."""
    found = removed_traffic(_counted([[10, 10, 40, 40, 60, 40]], top_k=2), {0: (1, 3, 5)})["0"]
    assert found["even_expert"] == pytest.approx(1 / 3) and found["even"] == 0.5
    assert [each["expert"] for each in found["experts"]] == [4, 2, 0]
    assert [each["share"] for each in found["experts"]] == pytest.approx([0.6, 0.4, 0.1])
    assert found["share"] == pytest.approx(0.55) and found["much"]  # expert 4 is busy, all three together are not


def test_a_layer_is_named_with_its_busy_experts() -> None:
    statistics = _counted([[24, 25, 10, 10, 10, 7, 7, 7], [12.5] * 8, [0, 0, 20, 20, 20, 20, 10, 10]])
    removed = removed_traffic(statistics, {0: tuple(range(2, 8)), 1: tuple(range(2, 8)), 2: tuple(range(2, 8))})
    assert [removed[layer]["much"] for layer in "012"] == [True, False, False]
    layer, advice = traffic_warnings(removed)
    assert layer == (
        "layer 0: expert 1 had 25 % of the tokens, expert 0 24 % (even: 12 %); the 2 that go had 49 % of its "
        "traffic (even: 25 %)"
    )
    assert "1 of 3 layers" in advice and "--criterion traffic-reap" in advice
    advice = traffic_warnings(removed, "traffic-reap")[-1]
    assert advice == "experts with much traffic go in 1 of 3 layers: keep more of them, and compare with evaluate"


def test_many_that_are_a_little_busy_are_much_together() -> None:
    """No expert is over 1.25 times its even share, all of them are."""
    statistics = _counted([[14, 14, 14, 14, 11, 11, 11, 11]])
    assert not removed_traffic(statistics, {0: (4, 5, 6, 7)})["0"]["much"]
    statistics = _counted([[15.6, 15.6, 15.6, 15.6, 9.4, 9.4, 9.4, 9.4]])
    removed = removed_traffic(statistics, {0: (4, 5, 6, 7)})
    assert not removed["0"]["much"] and removed["0"]["share"] < MUCH * 0.5
    statistics = _counted([[15.7, 15.7, 15.7, 15.6, 9.3, 9.3, 9.3, 9.4]])
    assert removed_traffic(statistics, {0: (4, 5, 6, 7)})["0"]["much"]


def test_nothing_goes_and_nothing_is_said() -> None:
    removed = removed_traffic(_counted([[50, 30, 20]]), {0: (0, 1, 2)})
    assert removed["0"] == {"share": 0, "even": 0, "even_expert": pytest.approx(1 / 3), "experts": [], "much": False}
    assert traffic_warnings(removed) == []
    one = traffic_warnings(removed_traffic(_counted([[50, 30, 20]]), {0: (1, 2)}))
    assert one[0] == "layer 0: expert 0 had 50 % of the tokens (even: 33 %), and goes"


def test_of_many_layers_those_that_lose_most_are_named() -> None:
    rows = [[50.0 + layer, 50.0 - layer] + [1.0] * 98 for layer in range(12)]
    lines = traffic_warnings(removed_traffic(_counted(rows), {layer: tuple(range(1, 100)) for layer in range(12)}))
    assert [line.split(":")[0] for line in lines[:-1]] == [f"layer {layer}" for layer in range(4, 12)]
    assert "12 of 12 layers (4 are not named here, --json has all)" in lines[-1]
    assert np.all(["expert 0 had" in line for line in lines[:-1]])
