"""What a collector makes of a router's logits and of the chosen experts, against plain float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moesurgeon.engine.observe import Observation
from moesurgeon.engine.routing import Routing
from moesurgeon.profiling import collector
from moesurgeon.profiling.collector import _together, router_figures, some_of

CASES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "two experts": ({}, 2, False),
    "one expert": ({}, 1, False),
    "eight": ({}, 8, False),
    "sixty-four": ({}, 64, False),
    "sigmoid": ({"scoring": "sigmoid"}, 16, False),
    "sigmoid with bias": ({"scoring": "sigmoid"}, 16, True),
    "groups": ({"groups": 4, "kept_groups": 2}, 16, False),
    "groups of sums with bias": (
        {"scoring": "sigmoid", "groups": 4, "kept_groups": 2, "group_score": "top2-sum"}, 16, True,
    ),
}  # fmt: skip


def _routing(**changes: Any) -> Routing:
    settings: dict[str, Any] = {
        "scoring": "softmax", "renormalises": True, "scale": 1.0, "groups": 1, "kept_groups": 1, "group_score": "max"
    }  # fmt: skip
    return Routing(**(settings | changes))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at_once", [1 << 17, 100])
def test_first_choice_entropy_and_margin(case: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_AT_ONCE", at_once)
    changes, experts, with_bias = CASES[case]
    routing = _routing(**changes)
    generator = torch.Generator().manual_seed(experts)
    logits = 3 * torch.randn(50, experts, generator=generator)
    logits[7] = 200.0 * torch.arange(experts)  # all scores but one are zero in float32, or all are one
    bias = torch.randn(experts, generator=generator) if with_bias else None
    first, entropy, margin = router_figures(routing, logits, bias)
    assert entropy.dtype == margin.dtype == torch.float64
    for token in range(50):
        row = logits[token].double()
        scores = (row.softmax(-1) if routing.scoring == "softmax" else row.sigmoid()).tolist()
        shares = [score / sum(scores) for score in scores]
        expected = -sum(share * math.log(share) for share in shares if share > 0)
        assert float(entropy[token]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        best, second = sorted([*scores, scores[0]] if experts == 1 else scores, reverse=True)[:2]
        assert float(margin[token]) == pytest.approx(best - second, rel=1e-5, abs=1e-6)
        if token != 7:
            ranked = routing.ranked(routing.scores(logits[token : token + 1]), bias)[0]
            assert int(first[token]) == max(range(experts), key=lambda expert: float(ranked[expert]))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_pairs_are_counted_both_ways(top_k: int) -> None:
    indices = torch.rand(40, 6, generator=torch.Generator().manual_seed(top_k)).topk(top_k, dim=-1).indices
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for row in indices.tolist():
        for one in row:
            for other in row:
                expected[one, other] += 1
    assert torch.equal(_together(indices, 6), expected)


def test_some_tokens_are_of_every_expert_and_of_all_the_text() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(5000, 60, generator=generator).topk(2, dim=-1).indices
    indices[1234] = torch.tensor([61, 60])  # the only one of two experts
    logits, inputs = torch.randn(5000, 62, generator=generator), torch.arange(5000.0)[:, None]
    seen = Observation(0, logits, indices, torch.rand(5000, 2), torch.rand(5000, 2), inputs, -inputs, inputs)
    some = some_of(seen)
    rows = some.inputs.flatten().long()
    assert set(some.indices.flatten().tolist()) == set(indices.flatten().tolist())
    assert {0, 1234} <= set(rows.tolist()) and 256 <= len(rows) < 400
    assert int(rows.diff().abs().max()) < 5000 and int(rows.sort().values.diff().max()) <= 20
    for name in ("logits", "indices", "weights", "norms", "inputs", "output"):
        assert torch.equal(getattr(some, name), getattr(seen, name)[rows])


def test_a_softmax_over_few_experts_is_the_same_softmax() -> None:
    logits = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_routing().scores(logits), logits.softmax(-1), rtol=1e-6, atol=1e-7)
