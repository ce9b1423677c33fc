"""What is told of fewer experts per token from the sums of a profile, against choices counted one by one."""

from __future__ import annotations

import numpy as np
import pytest

from moesurgeon.profiling.collapse import STARVED, collapse_of, collapse_warnings, loads_at
from moesurgeon.profiling.dispatch import add_dispatches
from moesurgeon.profiling.statistics import Statistics
from moesurgeon.profiling.summary import COLLAPSED, summary_of

EXPERTS, TOP_K, WINDOWS, LENGTH = 8, 3, 10, 128
TOKENS = WINDOWS * LENGTH


def _choices(seed: int, weights: list[float]) -> np.ndarray:
    """Return the experts of each token [T, K], the best first; experts of weight zero come last."""
    random = np.random.default_rng(seed)
    scores = np.log(np.maximum(weights, 1e-30)) + random.gumbel(size=(TOKENS, EXPERTS))
    return np.argsort(-scores, axis=1)[:, :TOP_K]


CHOICES = {
    0: _choices(0, [1] * EXPERTS),
    2: _choices(1, [40, 1, 1, 1, 1, 1, 0.5, 0.0]),
}


def _counted() -> Statistics:
    statistics = Statistics.empty(("text",), tuple(CHOICES), EXPERTS, TOP_K)
    statistics.sums["seen"][0, 0] = TOKENS
    for row, chosen_TK in enumerate(CHOICES.values()):
        hot = np.eye(EXPERTS)[chosen_TK]  # [T, K, E]
        statistics.sums["tokens"][0, 0, row] = hot.sum(axis=(0, 1))
        statistics.sums["weight"][0, 0, row] = hot.sum(axis=(0, 1))
        statistics.sums["first_choice"][0, 0, row] = hot[:, 0].sum(axis=0)
        statistics.sums["ranks"][0, row] = hot.sum(axis=0)
        by_window = hot.reshape(WINDOWS, LENGTH, TOP_K, EXPERTS).sum(axis=1)
        add_dispatches(statistics, row, [LENGTH] * WINDOWS, (by_window.sum(axis=1), by_window[:, 0]))
    return statistics


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_figures_are_those_of_the_first_choices(top_k: int) -> None:
    found = collapse_of(_counted(), top_k, has_bias=False)
    assert found is not None and list(found) == ["0", "2"]
    for layer, chosen_TK in CHOICES.items():
        figures, loads = found[str(layer)], np.bincount(chosen_TK[:, :top_k].ravel(), minlength=EXPERTS)
        share = loads / loads.sum()
        entropy = -sum(s * np.log(s) for s in share if s) / np.log(EXPERTS)
        assert figures["entropy"] == pytest.approx(entropy)
        assert figures["max_over_mean"] == pytest.approx(loads.max() / loads.mean())
        assert figures["collapsed"] is bool(entropy < COLLAPSED)
        assert figures["unused"] == [e for e in range(EXPERTS) if not loads[e]]
        assert figures["starved"] == [e for e in range(EXPERTS) if 0 < loads[e] < STARVED * loads.mean()]
        now = summary_of(_counted())["layers"][str(layer)]
        assert figures["as_is"] == {name: now[name] for name in ("entropy", "max_over_mean")}
        if top_k == 2:
            assert figures["overflow"] is None
            continue
        kind = "top_1" if top_k == 1 else "as_is"
        assert figures["overflow"] == {size: gates[kind]["dropped"] for size, gates in now["overflow"].items()}
    assert found["2"]["starved"] or found["2"]["unused"]


def test_overflow_of_top_1_is_counted_dispatch_by_dispatch() -> None:
    found = collapse_of(_counted(), 1, has_bias=False)
    assert found is not None
    for layer, chosen_TK in CHOICES.items():
        for factor in ("1", "1.25", "2"):
            places, dropped, routed = np.ceil(512 / EXPERTS * float(factor)), 0.0, 0
            for start in range(0, TOKENS - 511, 512):
                loads = np.bincount(chosen_TK[start : start + 512, 0], minlength=EXPERTS)
                dropped, routed = dropped + np.maximum(loads - places, 0).sum(), routed + 512
            rest = chosen_TK[TOKENS // 512 * 512 :, 0]
            places = np.ceil(len(rest) / EXPERTS * float(factor))
            dropped += np.maximum(np.bincount(rest, minlength=EXPERTS) - places, 0).sum()
            assert found[str(layer)]["overflow"]["512"][factor] == pytest.approx(dropped / (routed + len(rest)))


def test_warnings_name_the_layers_that_would_collapse() -> None:
    statistics = _counted()
    found = collapse_of(statistics, 1, has_bias=False)
    assert found is not None
    collapsed, unused = collapse_warnings(statistics, 1, found)
    assert "layer 2 would be collapsed: top-1 has 0." in collapsed and "as it is)" in collapsed
    assert unused == "1 expert would be given no token by top-1 (layer 2: 7)"
    even = {"0": found["0"]}
    assert collapse_warnings(statistics, 1, even) == []
    statistics.sums["seen"][:] *= 0.4
    assert "64 for each expert, under 100: too few to tell" in collapse_warnings(statistics, 1, even)[0]


def test_what_the_sums_do_not_say_is_not_made_up() -> None:
    """Ranks go by weight: where a bias takes part in the choice they are not its order."""
    statistics = _counted()
    assert loads_at(statistics, 2, has_bias=True) is None and collapse_of(statistics, 2, has_bias=True) is None
    assert loads_at(statistics, 1, has_bias=True) is not None and loads_at(statistics, 3, has_bias=True) is not None
    statistics.sums["weight"][:] = 0
    assert statistics.counts_only
    assert loads_at(statistics, 1, has_bias=False) is None and loads_at(statistics, 2, has_bias=False) is None
    assert collapse_of(statistics, 3, has_bias=False) is not None
