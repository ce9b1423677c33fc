"""Choosing by the exact error: what the real blocks say of every subset, run with the others masked."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesurgeon.engine.streams import Overlay
from moesurgeon.errors import ProfileError
from moesurgeon.pipeline.subsets import curves, reconstruct
from moesurgeon.profiling.artefact import Profile
from moesurgeon.profiling.statistics import Statistics
from moesurgeon.selection.choose import best
from moesurgeon.selection.criteria import scores_of
from tests.laws.inner_cases import Taken, checkpoint, real_errors, take
from tests.profiling.made import profile_of

CASES = {
    "mixtral": 6,
    "deepseek v1": 5,
    "deepseek v2, two groups": 6,
    "deepseek v3, two groups": 6,
    "deepseek v3, raw": 6,
    "ernie, bias": 6,
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Taken, int]:
    folder = tmp_path_factory.mktemp("reconstruction")
    return take(checkpoint(request.param, folder / "model"), folder), CASES[request.param]


def _profile(taken: Taken, **origin: Any) -> Profile:
    """Return the inner products in a profile whose other figures are random."""
    anatomy = taken.subject.anatomy
    statistics = Statistics.empty(("one", "two"), anatomy.moe_layers, anatomy.experts, anatomy.top_k)
    for number, name in enumerate(("tokens", "weight", "norm", "weighted_norm")):
        statistics.sums[name][:] = np.random.default_rng(number).uniform(1, 2, statistics.sums[name].shape)
    statistics.sums["seen"][:] = 100
    made = profile_of(statistics, **origin)
    return Profile(made.statistics, made.origin, taken.inner)


def _subsets(taken: Taken, count: int) -> list[tuple[int, ...]]:
    groups = taken.subject.anatomy.groups[0]
    size = 8 // groups
    return [
        kept
        for kept in itertools.combinations(range(8), count)
        if all(sum(e // size == g for e in kept) == count // groups for g in range(groups))
    ]


def test_the_choice_is_the_best_of_all_that_were_really_run(case: tuple[Taken, int]) -> None:
    taken, count = case
    anatomy = taken.subject.anatomy
    subsets = _subsets(taken, count)
    overlays = [
        Overlay(masked={layer: frozenset(range(8)) - set(kept) for layer in anatomy.moe_layers}) for kept in subsets
    ]
    really = real_errors(taken, [(overlay, None) for overlay in overlays])
    profile = _profile(taken)
    found = reconstruct(anatomy, profile, count, {})
    reap = best(scores_of(profile.weighted, "reap"), anatomy.moe_layers, count, anatomy.groups[0])
    for layer, errors in really.items():
        said = found.evidence["reconstruction"]["layers"][str(layer)]
        size = float(taken.inner.layer(layer).output.mean())
        assert found.kept[layer] == subsets[int(errors.argmin())]
        assert (said["exact"], said["compared"], said["covered"]) == (True, len(subsets), 1.0)
        assert said["error"] == pytest.approx(errors.min() / size, rel=1e-4, abs=2e-6)
        assert said["reap"] == pytest.approx(errors[subsets.index(reap[layer])] / size, rel=1e-4, abs=2e-6)
        assert errors.min() > 1e-3 * size
    assert reconstruct(anatomy, profile, count, {}) == found


def test_who_is_fixed_stays_and_the_rest_is_still_the_best(case: tuple[Taken, int]) -> None:
    taken, count = case
    anatomy, layer = taken.subject.anatomy, taken.subject.anatomy.moe_layers[0]
    profile = _profile(taken)
    free = reconstruct(anatomy, profile, count, {})
    dropped = next(e for e in range(8) if e not in free.kept[layer])
    found = reconstruct(anatomy, profile, count, {layer: frozenset({dropped})})
    errors = taken.errors(layer, subsets := [s for s in _subsets(taken, count) if dropped in s], anatomy.top_k)
    assert found.kept[layer] == subsets[int(errors.error.argmin())]
    assert {**found.kept, layer: ()} == {**free.kept, layer: ()}


def test_domains_count_what_they_weigh(case: tuple[Taken, int]) -> None:
    """A weight of zero is a profile without that domain."""
    taken, count = case
    anatomy = taken.subject.anatomy
    found = reconstruct(anatomy, _profile(taken, weights={"one": 0.0, "two": 3.0}), count, {})
    subsets, two = _subsets(taken, count), taken.inner.domain == 1
    for layer in anatomy.moe_layers:
        errors = taken.errors(layer, subsets, anatomy.top_k, tokens=two)
        assert found.kept[layer] == subsets[int(errors.error.argmin())]
        said = found.evidence["reconstruction"]["layers"][str(layer)]["error"]
        assert said == pytest.approx(errors.relative.min(), rel=1e-5, abs=1e-7)
    assert found.evidence["reconstruction"]["tokens"] == two.sum()
    with pytest.raises(ProfileError, match=r"no token .* has a weight"):
        reconstruct(anatomy, _profile(taken, weights={"one": 0.0, "two": 0.0}), count, {})


def test_stability_is_that_of_either_half_alone(case: tuple[Taken, int]) -> None:
    taken, count = case
    anatomy = taken.subject.anatomy
    found = reconstruct(anatomy, _profile(taken), count, {})
    subsets, changed = _subsets(taken, count), []
    for layer in anatomy.moe_layers:
        for parity in (0, 1):
            errors = taken.errors(layer, subsets, anatomy.top_k, tokens=taken.inner.fold % 2 == parity).error
            changed.append(len(set(found.kept[layer]) - set(subsets[int(errors.round(6).argmin())])) / (8 - count))
    assert found.stability is not None
    assert found.stability.changed == pytest.approx(np.mean(changed))


def test_curves_are_those_of_real_subsets(case: tuple[Taken, int]) -> None:
    taken, count = case
    anatomy, groups = taken.subject.anatomy, taken.subject.anatomy.groups[0]
    found, warnings = curves(anatomy, _profile(taken), count - groups, {})
    assert [int(layer) for layer in found] == list(anatomy.moe_layers)
    assert len(warnings) == 1 and "fewer than 20 for each of 8 experts" in warnings[0]
    for layer, points in found.items():
        assert [point["experts"] for point in points] == list(range(8, count - groups - 1, -groups))
        assert points[0]["error"] < 1e-6
        errors = taken.errors(int(layer), [point["kept"] for point in points], anatomy.top_k).relative
        np.testing.assert_allclose([point["error"] for point in points], errors, rtol=1e-5, atol=2e-6)


def test_few_tokens_and_experts_that_were_not_run_are_warned_of(tmp_path: Path) -> None:
    subject = checkpoint("deepseek v1", tmp_path / "model")
    taken = take(subject, tmp_path, experts=subject.anatomy.top_k)
    found = reconstruct(subject.anatomy, _profile(taken), 4, {})
    assert "rest on 60 tokens, fewer than 20 for each of 8 experts" in found.warnings[0]
    assert "an expert that they would be given was not run" in found.warnings[1]
    _found, warnings = curves(subject.anatomy, _profile(taken), 4, {})
    assert "the curve counts over 2% of the tokens as lost" in warnings[1]
