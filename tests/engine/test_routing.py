"""The rule of every family against the routers of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.engine.model import moe_blocks
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from tests.engine.small import running, saved, small_model

CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral", {"num_experts_per_tok": 8}),
    ("deepseek_v1", {}),
    ("deepseek_v1", {"num_experts_per_tok": 1}),
    ("deepseek_v1", {"norm_topk_prob": True}),
    ("deepseek_v1", {"norm_topk_prob": True, "num_experts_per_tok": 1}),
    ("deepseek_v2", {}),
    ("deepseek_v2", {"topk_group": 1, "num_experts_per_tok": 2}),
    ("deepseek_v2", {"topk_method": "greedy", "norm_topk_prob": True}),  # which V2 ignores
    ("deepseek_v3", {}),
    ("deepseek_v3", {"num_experts_per_tok": 1}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 1}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_choice_and_weights_are_those_of_the_stock_router(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    subject = saved(small_model(family, **changes), tmp_path / "model")
    routing = routing_of(subject.anatomy)
    x_TH = torch.randn(200, subject.anatomy.hidden, generator=torch.Generator().manual_seed(1))
    for block in moe_blocks(running(subject), subject.anatomy):
        with torch.no_grad():
            logits_TE, weights_TK, indices_TK = block.router(x_TH)
        bias = selection_bias(block)
        assert (bias is not None) == (family == "deepseek_v3")
        scores_TE = routing.scores(logits_TE)
        chosen_TK = routing.choose(scores_TE, bias, subject.anatomy.top_k)
        assert torch.equal(chosen_TK.sort(-1).values, indices_TK.sort(-1).values)
        torch.testing.assert_close(routing.weights(scores_TE, indices_TK), weights_TK, rtol=1e-6, atol=0)
        # The best comes first: it is what a top-1 gate would take.
        ranked_TE = routing.ranked(scores_TE, bias)
        assert torch.equal(chosen_TK[:, 0], ranked_TE.argmax(-1))
        assert torch.equal(routing.choose(scores_TE, bias, 1), chosen_TK[:, :1])


def test_the_first_choice_is_that_of_the_stock_router_at_top_1(tmp_path: Path) -> None:
    """What the profile's first_choice claims, for groups and a bias as well."""
    for family in ("mixtral", "deepseek_v2", "deepseek_v3"):
        subject = saved(small_model(family), tmp_path / family)
        top_1 = saved(small_model(family, num_experts_per_tok=1), tmp_path / f"{family}-1")
        x_TH = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
        pairs = zip(
            moe_blocks(running(subject), subject.anatomy), moe_blocks(running(top_1), top_1.anatomy), strict=True
        )
        routing = routing_of(subject.anatomy)
        for block, single in pairs:
            assert torch.equal(block.router.weight, single.router.weight)
            with torch.no_grad():
                logits_TE, _, _ = block.router(x_TH)
                _, _, indices = single.router(x_TH)
            first = routing.choose(routing.scores(logits_TE), selection_bias(block), 1)
            assert torch.equal(first, indices)


def _routing(**changes: Any) -> Routing:
    plain = {"scoring": "softmax", "renormalises": False, "scale": 1.0, "groups": 1, "kept_groups": 1}
    return Routing(**(plain | {"group_score": "max"} | changes))


def test_groups_are_chosen_by_the_score_that_the_family_names() -> None:
    # Group 0 has the best expert, group 1 the best two.
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    by_best = _routing(groups=2, kept_groups=1, group_score="max")
    by_two = _routing(groups=2, kept_groups=1, group_score="top2-sum")
    assert by_best.choose(scores, None, 2).tolist() == [[0, 1]]
    assert by_two.choose(scores, None, 2).tolist() == [[2, 3]]
    assert by_best.ranked(scores, None).tolist()[0][2:] == [float("-inf")] * 2


def test_a_bias_changes_the_choice_and_not_the_weights() -> None:
    scores = torch.tensor([[0.4, 0.3, 0.2]])
    routing = _routing(renormalises=True, scale=2.0)
    chosen = routing.choose(scores, torch.tensor([0.0, 0.0, 1.0]), 2)
    assert chosen.tolist() == [[2, 0]]
    torch.testing.assert_close(routing.weights(scores, chosen), torch.tensor([[2 * 0.2 / 0.6, 2 * 0.4 / 0.6]]))
