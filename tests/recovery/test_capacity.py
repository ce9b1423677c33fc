"""Places of experts: who comes first, who is dropped, and what the router hears of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moesurgeon.engine.model import logits_of, moe_blocks
from moesurgeon.recovery.capacity import places_of, within_capacity
from moesurgeon.recovery.estimator import learning_routers
from tests.engine.small import running, saved, small_model


def _one_by_one(chosen: np.ndarray, text: np.ndarray, experts: int, factor: float) -> np.ndarray:
    """Fill places choice by choice: all first choices in order, then all second ones."""
    tokens, top_k = chosen.shape
    places = int(np.ceil(factor * text.sum() * top_k / experts))
    taken, kept = np.zeros(experts, dtype=int), np.zeros((tokens, top_k), dtype=bool)
    for rank in range(top_k):
        for token in range(tokens):
            expert = chosen[token, rank]
            kept[token, rank] = taken[expert] < places
            taken[expert] += int(text[token])
    return kept


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("top_k", [1, 2])
def test_places_are_filled_in_order(top_k: int, factor: float) -> None:
    random = torch.Generator().manual_seed(top_k)
    chosen = torch.rand(60, 5, generator=random).square().argsort(dim=-1)[:, :top_k]
    text = torch.rand(60, generator=random) < 0.8
    kept = within_capacity(chosen, text, 5, factor)
    expected = _one_by_one(chosen.numpy(), text.numpy(), 5, factor)
    assert np.array_equal(kept.numpy()[text.numpy()], expected[text.numpy()])
    assert kept[text].sum() < text.sum() * top_k or factor > 1


def test_places_are_rounded_up() -> None:
    assert [places_of(choices, 4, 1.0) for choices in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize("candidates", [1, None])
def test_what_is_dropped_adds_nothing_and_only_under_gradients(candidates: int | None, tmp_path: Path) -> None:
    subject = saved(small_model("mixtral", num_experts_per_tok=1, num_hidden_layers=1), tmp_path / "model")
    model = running(subject)
    tokens = torch.arange(40).reshape(2, 20)
    edited = logits_of(model, tokens, None)
    (block,) = moe_blocks(model, subject.anatomy)
    outputs: list[torch.Tensor] = []
    block.experts.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach()))
    with learning_routers(model, subject.anatomy, candidates=candidates, capacity=1.0) as learning:
        assert torch.equal(logits_of(model, tokens, None), edited)
        learning.is_text = torch.ones(40, dtype=torch.bool)
        logits = model(input_ids=tokens, use_cache=False).logits
    kept = within_capacity(learning.routed[0].chosen, learning.is_text, 8, 1.0)[:, 0]
    assert 0 < kept.sum() < 40
    whole, dropped = outputs
    torch.testing.assert_close(dropped[kept], whole[kept], rtol=1e-5, atol=1e-6)
    assert (dropped[~kept] == 0).all()
    assert not torch.allclose(logits, edited)


def test_places_for_everybody_change_nothing(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral"), tmp_path / "model")
    model = running(subject)
    tokens = torch.arange(40).reshape(2, 20)
    results = []
    for capacity in (None, 8.0):
        with learning_routers(model, subject.anatomy, candidates=None, capacity=capacity) as learning:
            learning.is_text = torch.ones(40, dtype=torch.bool)
            results.append(model(input_ids=tokens, use_cache=False).logits)
    assert torch.equal(*results)
