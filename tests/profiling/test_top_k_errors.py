"""What fewer experts per token cost by inner products, against outputs that are summed up in float64."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from moesurgeon.profiling.subset_errors import errors_of_subsets
from moesurgeon.profiling.top_k_errors import errors_by_top_k
from tests.profiling.vectors import RULES, Layer

MOST = 3


def _rule(layer: Layer, *, single_is_raw: bool = False) -> dict[str, object]:
    rule = asdict(layer.routing)
    renormalises = rule.pop("renormalises")
    return {**rule, "renormalises": [renormalises and not single_is_raw, renormalises]}


def _outputs(layer: Layer, k: int, *, single_is_raw: bool = False) -> np.ndarray:
    """Return what a top-``k`` gate gives [N, H], token by token."""
    routing = replace(layer.routing, renormalises=False) if single_is_raw and k == 1 else layer.routing
    other = replace(layer, routing=routing, top_k=k)
    return np.stack([other.output(token, other.everyone) for token in range(len(other.logits))])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("single_is_raw", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_k_is_what_the_outputs_say(rule: str, single_is_raw: bool, bias: bool) -> None:
    layer = Layer.random(5, rule, tokens=30, top_k=MOST, bias=bias)
    weights = np.random.default_rng(6).choice([0.0, 0.5, 2.0], len(layer.logits))
    found = errors_by_top_k(layer.inner(), _rule(layer, single_is_raw=single_is_raw), MOST, weights)
    whole, root = layer.whole, np.sqrt(weights)[:, None]
    size = np.square(root * whole).sum()
    for k in range(1, MOST + 1):
        y_NH = _outputs(layer, k, single_is_raw=single_is_raw)
        error = np.square(root * (whole - y_NH)).sum() / size
        assert found.errors[k - 1] == pytest.approx(error, rel=2e-5, abs=2e-6)
        # The factor by least squares on all numbers of the outputs.
        [scale], [left], *_rest = np.linalg.lstsq((root * y_NH).reshape(-1, 1), (root * whole).ravel(), rcond=None)
        assert found.scales[k - 1] == pytest.approx(scale, rel=1e-5)
        assert found.scaled[k - 1] == pytest.approx(left / size, rel=2e-5, abs=2e-6)
    assert found.errors[-1] < 1e-6 and found.scales[-1] == pytest.approx(1.0, abs=1e-6)
    assert (found.scaled <= found.errors + 1e-9).all() and found.errors[0] > 1e-2


@pytest.mark.parametrize("rule", RULES)
def test_they_are_those_of_the_subset_of_all_experts(rule: str) -> None:
    layer = Layer.random(7, rule, tokens=50, top_k=MOST, bias=True)
    found = errors_by_top_k(layer.inner(), _rule(layer), MOST)
    everyone = np.ones((1, 8), dtype=bool)
    for k in range(1, MOST + 1):
        [error] = errors_of_subsets(layer.inner(), layer.routing, everyone, k).relative
        assert found.errors[k - 1] == pytest.approx(error, rel=1e-6, abs=1e-7)


def test_in_pieces_they_are_the_same() -> None:
    layer = Layer.random(8, "softmax", tokens=50, top_k=MOST)
    whole, pieces = (errors_by_top_k(layer.inner(), _rule(layer), MOST, at_once=size) for size in (1 << 26, 1 << 11))
    for name in ("errors", "scaled", "scales"):
        np.testing.assert_allclose(getattr(whole, name), getattr(pieces, name), rtol=1e-6, atol=1e-8)


def test_a_token_whose_expert_was_not_run_counts_as_given_nothing() -> None:
    """A profile runs who was chosen; where a tie falls otherwise the error may not be made up."""
    layer = Layer.random(9, "softmax", tokens=30, top_k=2)
    run = np.sort(np.random.default_rng(1).permuted(np.tile(np.arange(8), (30, 1)), axis=1)[:, :5], axis=1)
    found = errors_by_top_k(layer.inner(run), _rule(layer), 2)
    assert found.errors[1] == pytest.approx(layer.error(layer.everyone, run=run), rel=1e-5)
    assert found.errors[1] > 0.1


def test_a_layer_that_gives_nothing_has_no_error() -> None:
    layer = Layer.random(10, "renormalised", tokens=4)
    silent = replace(layer, outputs=np.zeros_like(layer.outputs))
    found = errors_by_top_k(silent.inner(), _rule(silent), 2)
    assert found.as_dict() == {
        "errors": {"1": 0.0, "2": 0.0},
        "scaled": {"1": 0.0, "2": 0.0},
        "scale": {"1": 1.0, "2": 1.0},
    }
