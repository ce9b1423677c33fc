"""What inner products say of subsets and top-k, against blocks that really route so.

Legend: T tokens, N tokens of the sample, E experts, m experts run for a token, K experts per token, H hidden.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from moesurgeon.engine.device import Placement
from moesurgeon.engine.routing import Routing
from moesurgeon.engine.streams import Overlay
from moesurgeon.errors import UsageError
from moesurgeon.profiling.inner import InnerLayer
from moesurgeon.profiling.subset_errors import errors_of_subsets
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.engine.small import saved, small_model
from tests.laws.inner_cases import CASES, COUNT, Taken, checkpoint, real_errors, take


@pytest.fixture(scope="module", params=CASES)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    folder = tmp_path_factory.mktemp("inner")
    return take(checkpoint(request.param, folder / "model"), folder)


def test_they_say_what_masked_experts_and_another_top_k_cost(taken: Taken) -> None:
    """The real block with the experts masked in its router, shared experts and all."""
    anatomy, experts = taken.subject.anatomy, range(8)
    subsets = {
        1: [(0, 1, 2), (5, 6, 7), (0, 2, 4, 6), (0, 1, 2, 3, 4, 5, 7)],
        2: [(0, 2, 3, 4, 6, 7), (0, 2, 4, 6), (1, 3, 4, 7), (0, 1, 2, 3, 6, 7)],
        4: [(0, 1, 2, 3, 6, 7), (2, 3, 4, 5), (0, 1, 2, 3, 4, 5)],
    }[anatomy.groups[0]]
    subsets.append(tuple(experts))
    asked = [(kept, top_k) for kept in subsets for top_k in {1, anatomy.top_k}]
    overlays = [
        Overlay(
            plan=None if top_k == anatomy.top_k else plan_retop(anatomy, RetopSpec(top_k=top_k)),
            masked={layer: frozenset(experts) - set(kept) for layer in anatomy.moe_layers},
        )
        for kept, top_k in asked
    ]
    for layer, expected in real_errors(taken, [(overlay, None) for overlay in overlays]).items():
        size = float(taken.inner.layer(layer).output.mean())
        assert (expected > 1e-2 * size).sum() > len(asked) / 3  # it did cost something
        for (kept, top_k), error in zip(asked, expected, strict=True):
            found = taken.errors(layer, [kept], top_k)
            assert found.covered.tolist() == [1.0]
            assert found.error[0] == pytest.approx(error, rel=2e-5, abs=2e-6 * size), (layer, kept, top_k)
            assert found.relative[0] == pytest.approx(error / size, rel=2e-5, abs=2e-6)
            if len(kept) == 8 and top_k == anatomy.top_k:
                assert found.relative[0] < 1e-6


def test_they_say_what_more_experts_would_give(tmp_path: Path) -> None:
    taken = take(checkpoint("mixtral", tmp_path / "model"), tmp_path)
    dropped = Overlay(masked=dict.fromkeys(taken.subject.anatomy.moe_layers, frozenset({3})))
    for layer, (plain, cut) in real_errors(taken, [(Overlay(), 4), (dropped, 3)]).items():
        assert taken.errors(layer, [range(8)], 4).error[0] == pytest.approx(plain, rel=2e-5)
        assert taken.errors(layer, [(0, 1, 2, 4, 5, 6, 7)], 3).error[0] == pytest.approx(cut, rel=2e-5)


def test_all_subsets_at_once_and_in_small_pieces_are_those_one_by_one(taken: Taken) -> None:
    top_k = taken.subject.anatomy.top_k
    groups = taken.subject.anatomy.groups[0]
    # In groups of two, both go or none.
    subsets = [
        kept
        for kept in combinations(range(8), 6)
        if groups < 4 or all((e in kept) == (e + 1 in kept) for e in (0, 2, 4, 6))
    ]
    layer = taken.subject.anatomy.moe_layers[-1]
    at_once, pieces = taken.errors(layer, subsets, top_k), taken.errors(layer, subsets, top_k, at_once=1 << 12)
    # A softmax in float32 is rounded in another way for another number of rows.
    alone = [taken.errors(layer, [subset], top_k).error[0] for subset in subsets]
    np.testing.assert_allclose(at_once.error, alone, rtol=1e-6)
    np.testing.assert_allclose(pieces.error, alone, rtol=1e-6)
    of_domain = [taken.errors(layer, subsets, top_k, tokens=taken.inner.domain == number).error for number in range(2)]
    counts = np.bincount(taken.inner.domain)
    np.testing.assert_allclose(counts @ of_domain / counts.sum(), at_once.error, rtol=1e-6)
    none = taken.errors(layer, subsets, top_k, tokens=np.zeros(taken.inner.shape.tokens, dtype=bool))
    assert np.isnan(none.error).all() and np.isnan(none.relative).all() and not none.covered.any()


@pytest.mark.parametrize(
    ("groups", "score", "kept", "top_k", "message"),
    [
        ((1, 1), "max", (0, 1), 2, None),
        ((1, 1), "max", (0, 1), 3, "of 2 experts .* keep at least 3"),
        ((4, 2), "max", (0, 2, 4, 6), 2, None),
        ((4, 2), "max", (0, 1, 2, 4, 6), 3, "of 2 experts .* keep at least 3"),
        ((4, 2), "max", (0, 1, 2, 3), 4, None),
        ((4, 2), "max", (0, 1), 2, "fewer than 2 groups"),
        ((4, 2), "top2-sum", (0, 1, 2, 4, 5), 4, None),  # that of 2 alone never wins
        ((4, 2), "top2-sum", (0, 1, 2, 4, 6), 2, "fewer than 2 groups"),
    ],
)
def test_a_subset_that_cannot_give_a_token_enough_is_refused(
    groups: tuple[int, int], score: str, kept: tuple[int, ...], top_k: int, message: str | None
) -> None:
    routing = Routing("sigmoid", True, 1.0, *groups, score)
    mask = np.isin(np.arange(8), kept)[None]
    one = InnerLayer(
        np.ones((1, 8, 8), np.float32), np.ones((1, 8), np.float32), np.ones(1, np.float32),
        np.arange(8, dtype=np.float32)[None], None, None,
    )  # fmt: skip
    if message is None:
        assert errors_of_subsets(one, routing, mask, top_k).error == pytest.approx(0, abs=1e-6)
        return
    with pytest.raises(UsageError, match=message):
        errors_of_subsets(one, routing, mask, top_k)


@pytest.mark.parametrize("case", ["mixtral", "deepseek v1", "deepseek v2, groups", "deepseek v3", "minimax m2, bias"])
def test_of_the_likeliest_experts_alone_covered_tokens_are_exact(case: str, tmp_path: Path) -> None:
    subject = checkpoint(case, tmp_path / "model")
    (tmp_path / "few").mkdir()
    whole, few = take(subject, tmp_path), take(subject, tmp_path / "few", experts=4)
    top_k = subject.anatomy.top_k
    for layer in subject.anatomy.moe_layers:
        all_of, some = whole.inner.layer(layer), few.inner.layer(layer)
        assert some.gram.shape == (COUNT, 4, 4)
        tiny = 1e-6 * float(some.output.mean())
        assert some.experts is not None and (np.diff(some.experts.astype(int)) > 0).all()
        at = some.experts.astype(int)
        tokens = np.arange(COUNT)
        np.testing.assert_allclose(
            some.gram, all_of.gram[tokens[:, None, None], at[:, :, None], at[:, None, :]], rtol=1e-5, atol=tiny
        )
        np.testing.assert_allclose(some.with_output, all_of.with_output[tokens[:, None], at], rtol=1e-5, atol=tiny)
        assert np.array_equal(some.output, all_of.output) and np.array_equal(some.logits, all_of.logits)
        # What was chosen is there: the model as it is has no error, and nothing is left out.
        found = few.errors(layer, [range(8)], top_k)
        assert found.covered.tolist() == [1.0] and found.relative[0] < 1e-6
        kept = (0, 1, 4, 5) if subject.anatomy.groups[0] > 1 else (0, 2, 4, 6)
        found = few.errors(layer, [kept], top_k)
        assert 0 < found.covered[0] < 1
        # The same tokens, judged with all experts at hand.
        covered = np.array(
            [few.errors(layer, [kept], top_k, tokens=tokens == token).covered[0] == 1 for token in tokens]
        )
        assert covered.mean() == found.covered[0]
        expected = whole.errors(layer, [kept], top_k, tokens=covered).error[0]
        assert found.error[0] == pytest.approx(expected, rel=1e-5, abs=tiny)


def test_in_bfloat16_the_model_as_it_is_has_an_error_of_rounding_only(tmp_path: Path) -> None:
    model = small_model("mixtral").to(torch.bfloat16)
    taken = take(saved(model, tmp_path / "model"), tmp_path, placement=Placement(torch.device("cpu"), torch.bfloat16))
    for layer in taken.subject.anatomy.moe_layers:
        assert taken.errors(layer, [range(8)], 2).relative[0] < 1e-4
        assert taken.errors(layer, [range(6)], 2).relative[0] > 1e-2
