"""The weights of domains: what counts in decisions, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from moesurgeon.profiling.artefact import Origin, Profile
from moesurgeon.profiling.statistics import FOLDS, PEAK, PER_EXPERT, PER_LAYER, Statistics
from moesurgeon.profiling.uncertainty import per_routed_token, per_token
from moesurgeon.selection.criteria import CRITERIA, scores_of

CLUSTERED = ("tokens", "weight", "norm", "weighted_norm")


def _of_documents(domains: dict[str, int], repeat: dict[str, int] | None = None) -> Statistics:
    """Return statistics of some random documents per domain; ``repeat`` adds each document's sums so many times."""
    random = np.random.default_rng(3)
    result = Statistics.empty(tuple(domains), (0, 1), 4, 2)
    for place, (domain, count) in enumerate(domains.items()):
        for number in range(count):
            length = float(random.integers(50, 400))
            values = {name: random.integers(0, 90, (2, 4)).astype(float) for name in PER_EXPERT}
            times = (repeat or {}).get(domain, 1)
            result.sums["seen"][place, 0] += times * length
            result.sums["documents"][place] += 1
            result.sums["documents.squares"][place] += (times * length) ** 2
            result.sums["seen.folds"][place, number % FOLDS] += times * length
            for name, value in values.items():
                result.sums[name][place, 0] += times * value
            for name in CLUSTERED:
                x = times * values[name]
                result.sums[f"{name}.squares"][place] += x * x
                result.sums[f"{name}.by_document"][place] += x * times * length
                result.sums[f"{name}.by_tokens"][place] += x * times * values["tokens"]
                result.sums[f"{name}.folds"][place, number % FOLDS] += x
    return result


def test_a_weight_is_as_many_times_each_document() -> None:
    domains = {"code": 9, "chat": 7}
    weighted = _of_documents(domains).weighted({"chat": 3})
    thrice = _of_documents(domains, repeat={"chat": 3})
    for name, array in thrice.sums.items():
        np.testing.assert_allclose(weighted.sums[name], array, rtol=1e-12, err_msg=name)
    for name in CLUSTERED:
        for estimate in (per_token, per_routed_token):
            np.testing.assert_allclose(estimate(weighted, name).error, estimate(thrice, name).error, rtol=1e-9)


def test_weighting_changes_neither_the_sums_it_is_from_nor_peaks_nor_what_has_no_domain() -> None:
    statistics = _of_documents({"code": 3, "chat": 3})
    statistics.sums[PEAK][...] = 5.0
    statistics.sums["together"][...] = 7.0
    before = {name: array.copy() for name, array in statistics.sums.items()}
    weighted = statistics.weighted({"code": 0.5})
    assert all(np.array_equal(statistics.sums[name], array) for name, array in before.items())
    for name in (PEAK, "together", "documents", "dispatch", "capacity"):
        assert np.array_equal(weighted.sums[name], before[name])
    for name in (*PER_LAYER, *PER_EXPERT):
        assert np.array_equal(weighted.sums[name][1], before[name][1])
    assert statistics.weighted({}) is statistics and statistics.weighted({"code": 1.0}) is statistics


def test_support_is_of_text_and_not_of_weights() -> None:
    statistics = _of_documents({"code": 5, "chat": 5})
    tokens = statistics.by_domain("tokens")
    assert np.array_equal(statistics.support(), tokens.sum(axis=0))
    np.testing.assert_allclose(statistics.weighted({"code": 4, "chat": 4}).support(), tokens.sum(axis=0))
    np.testing.assert_allclose(statistics.weighted({"chat": 0}).support(), tokens[0])
    uneven = statistics.weighted({"chat": 10}).support()
    assert (uneven <= tokens.sum(axis=0) + 1e-9).all() and (uneven >= tokens[1] - 1e-9).all()
    assert not Statistics.empty(("a",), (0,), 4, 2).weighted({"a": 2}).support().any()


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_a_weight_of_zero_leaves_a_domain_out_of_the_choice(criterion: str) -> None:
    both = _of_documents({"code": 6, "chat": 6})
    origin = Origin(
        fingerprint="f", family="mixtral", splits={}, trace_hashes={}, length=64, placement="cpu", transformers="5",
        weights={"code": 1.0, "chat": 0.0},
    )  # fmt: skip
    alone = _of_documents({"code": 6})
    assert scores_of(Profile(both, origin).weighted, criterion) == pytest.approx(scores_of(alone, criterion))
    assert scores_of(both, criterion) != pytest.approx(scores_of(alone, criterion))
