"""The fast errors of subsets against routing token by token in float64, and against those that are not fast."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesurgeon.profiling import removals
from moesurgeon.profiling.inner import InnerLayer
from moesurgeon.profiling.removals import LayerErrors
from moesurgeon.profiling.subset_errors import errors_of_subsets
from tests.profiling.vectors import RULES, Layer

CASES = [(rule, bias) for rule in RULES for bias in (False, True)]
cases = pytest.mark.parametrize(("rule", "bias"), CASES)


def _mask(experts: int, *subsets: tuple[int, ...]) -> np.ndarray:
    return np.array([np.isin(np.arange(experts), subset) for subset in subsets])


def _subsets(layer: Layer, random: np.random.Generator, count: int = 3) -> list[tuple[int, ...]]:
    """Return all experts, and subsets of them without a few; of groups none is left with too few to win."""
    found = [tuple(layer.everyone)]
    while len(found) < count:
        size = len(layer.everyone) // layer.routing.groups
        kept = tuple(e for e in layer.everyone if random.random() < 0.75)
        if all(sum(e // size == g for e in kept) >= min(3, size) for g in range(layer.routing.groups)):
            found.append(kept)
    return found


@cases
def test_each_removal_is_what_routing_anew_gives(rule: str, bias: bool) -> None:
    random = np.random.default_rng(3)
    layer = Layer.random(1, rule, experts=16, top_k=3, bias=bias)
    weights = random.choice([0.0, 0.5, 2.0], len(layer.logits))
    errors = LayerErrors(layer.inner(), layer.routing, layer.top_k, weights)
    for kept in _subsets(layer, random):
        [mask] = _mask(16, kept)
        found = errors.without_each(mask)
        assert np.isinf(found[~mask]).all()
        expected = [layer.error([other for other in kept if other != e], weights) for e in kept]
        np.testing.assert_allclose(found[mask], expected, rtol=1e-5, atol=1e-6)
        assert errors(mask[None])[0] == pytest.approx(layer.error(kept, weights), rel=1e-5, abs=1e-6)
        assert errors.covered(mask) == pytest.approx(1.0)


@cases
def test_one_more_or_less_is_the_same_as_the_subset_itself(rule: str, bias: bool) -> None:
    """What a search compares must not depend on how it got there."""
    layer = Layer.random(2, rule, experts=16, top_k=2, bias=bias, tokens=100)
    errors = LayerErrors(layer.inner(), layer.routing, layer.top_k)
    for kept in _subsets(layer, np.random.default_rng(4)):
        [mask] = _mask(16, kept)
        alone = errors(mask & (np.arange(16) != np.flatnonzero(mask)[:, None]))
        np.testing.assert_allclose(
            errors.without_each(mask)[mask], alone, rtol=0, atol=1.1e-9
        )  # a unit of the last digit
        plain = errors_of_subsets(layer.inner(), layer.routing, mask[None], layer.top_k)
        assert errors(mask[None])[0] == pytest.approx(plain.relative[0], rel=1e-5, abs=1e-6)


@cases
def test_a_token_whose_experts_were_not_run_is_lost(rule: str, bias: bool) -> None:
    layer = Layer.random(5, rule, experts=16, top_k=2, bias=bias)
    # Of those that were chosen all were run, as in a profile.
    chosen = [list(layer.route(token, layer.everyone)) for token in range(len(layer.logits))]
    run = np.array([sorted([*mine, *(e for e in range(16) if e not in mine)][:4]) for mine in chosen])
    inner = layer.inner(run)
    errors = LayerErrors(inner, layer.routing, layer.top_k)
    assert errors.covered(np.ones(16, dtype=bool)) == 1.0
    shares = []
    for kept in _subsets(layer, np.random.default_rng(6)):
        [mask] = _mask(16, kept)
        expected = [layer.error([other for other in kept if other != e], run=run) for e in kept]
        np.testing.assert_allclose(errors.without_each(mask)[mask], expected, rtol=1e-5, atol=1e-6)
        plain = errors_of_subsets(inner, layer.routing, mask[None], layer.top_k)
        assert errors.covered(mask) == pytest.approx(plain.covered[0])
        shares.append(errors.covered(mask))
    assert min(shares) < 1.0


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer.random(7, "softmax", tokens=50)
    whole = LayerErrors(layer.inner(), layer.routing, 2)
    monkeypatch.setattr(removals, "_AT_ONCE", 7)
    pieces = LayerErrors(layer.inner(), layer.routing, 2)
    mask = _mask(8, tuple(range(1, 8)))[0]
    np.testing.assert_allclose(pieces.without_each(mask)[mask], whole.without_each(mask)[mask], rtol=0, atol=1.1e-9)
    np.testing.assert_allclose(pieces(mask[None]), whole(mask[None]), rtol=0, atol=1.1e-9)


@pytest.mark.parametrize("rule", ["softmax", "renormalised"])
def test_what_a_sure_router_leaves_is_told_apart(rule: str) -> None:
    """Where one expert has all but nothing of the softmax, those behind it share what it leaves when it goes."""
    layer = Layer.random(8, rule, tokens=30)
    logits = layer.logits.copy()
    logits[:, 2] += 60.0  # the others' scores are 1e-26 of it
    sure = Layer(layer.outputs, logits, None, layer.routing, 2)
    errors = LayerErrors(sure.inner(), sure.routing, 2)
    found = errors.without_each(np.ones(8, dtype=bool))
    expected = [sure.error([other for other in range(8) if other != e]) for e in range(8)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_that_gives_nothing_costs_nothing() -> None:
    logits = np.zeros((3, 4), np.float32)
    nothing = InnerLayer(np.zeros((3, 4, 4), np.float32), logits, np.zeros(3, np.float32), logits, None, None)
    errors = LayerErrors(nothing, RULES["softmax"], 2)
    assert errors(_mask(4, (0, 1), (2, 3))).tolist() == [0.0, 0.0]
    assert errors.without_each(np.ones(4, dtype=bool)).tolist() == [0.0] * 4


def test_what_leaves_a_token_too_few_is_infinite() -> None:
    layer = Layer.random(9, "softmax")
    errors = LayerErrors(layer.inner(), layer.routing, 2)
    assert np.isinf(errors.without_each(_mask(8, (3, 5))[0])).all()
    for pair in itertools.combinations((1, 3, 5), 2):
        [third] = {1, 3, 5} - set(pair)
        found = errors.without_each(_mask(8, (1, 3, 5))[0])
        assert found[third] == pytest.approx(layer.error(pair), rel=1e-5)


def test_experts_that_nobody_is_given_are_missed_alike() -> None:
    """To the last digit, so that the lower numbers can be preferred."""
    layer = Layer.random(10, "softmax", experts=16)
    unused = np.setdiff1d(range(16), [e for token in range(20) for e in layer.route(token, range(16))])
    flat = layer.logits.copy()
    flat[:, unused] = -30.0
    errors = LayerErrors(Layer(layer.outputs, flat, None, layer.routing, 2).inner(), layer.routing, 2)
    assert len(unused) > 1 and len(set(errors.without_each(np.ones(16, dtype=bool))[unused])) == 1
