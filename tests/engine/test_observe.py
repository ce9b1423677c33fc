"""What is recorded of the blocks, and that watching leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from moesurgeon.engine.model import MoeBlock, logits_of, moe_blocks
from moesurgeon.engine.observe import Observation, expert_outputs, observed, replays
from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import Subject
from tests.engine.small import running, saved, small_model

Opened = tuple[Subject, PreTrainedModel, list[MoeBlock]]


@pytest.fixture(params=["mixtral", "deepseek_v3"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    subject = saved(small_model(request.param), tmp_path / "model")
    model = running(subject)
    return subject, model, moe_blocks(model, subject.anatomy)


TOKENS = torch.arange(24).reshape(2, 12)
MASK = torch.ones_like(TOKENS)
MASK[1, 8:] = 0


def _is_untouched(block: MoeBlock) -> bool:
    return not block.router._forward_hooks and block.experts.forward == type(block.experts).forward.__get__(
        block.experts
    )


def test_every_block_of_every_pass_is_seen_as_it_was(opened: Opened) -> None:
    subject, model, blocks = opened
    seen: list[Observation] = []
    before = logits_of(model, TOKENS, MASK)
    with observed(blocks, lambda block, observation: seen.append(observation)):
        torch.testing.assert_close(logits_of(model, TOKENS, MASK), before, rtol=1e-5, atol=1e-5)
        logits_of(model, TOKENS[:1], None)
    layers = list(subject.anatomy.moe_layers)
    assert [observation.layer for observation in seen] == layers * 2
    assert [len(observation.inputs) for observation in seen] == [24] * len(layers) + [12] * len(layers)
    for block, observation in zip(blocks, seen[: len(layers)], strict=True):
        logits, weights, indices = block.router(observation.inputs)
        assert torch.equal(observation.logits, logits)
        assert torch.equal(observation.weights, weights)
        assert torch.equal(observation.indices, indices)
        stock = block.experts(observation.inputs, indices, weights).detach()
        torch.testing.assert_close(observation.output, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))


def test_norms_are_those_of_single_experts_before_weighting(opened: Opened) -> None:
    _, model, blocks = opened
    seen: dict[int, Observation] = {}
    with observed(blocks, lambda block, observation: seen.update({block.layer: observation})):
        logits_of(model, TOKENS, None)
    for block in blocks:
        observation = seen[block.layer]
        for token in range(len(observation.inputs)):
            for rank, expert in enumerate(observation.indices[token].tolist()):
                # The stock experts, asked for this expert alone with weight one.
                alone = block.experts(observation.inputs[token, None], torch.tensor([[expert]]), torch.ones(1, 1))
                torch.testing.assert_close(observation.norms[token, rank], alone.norm().detach(), rtol=1e-5, atol=0)


def test_the_replay_notices_another_weight_or_another_expert(opened: Opened) -> None:
    _, model, blocks = opened
    seen: dict[int, Observation] = {}
    stock = {block.layer: block.experts.forward for block in blocks}
    with observed(blocks, lambda block, observation: seen.update({block.layer: observation})):
        logits_of(model, TOKENS, None)
    for block in blocks:
        observation = seen[block.layer]
        assert replays(block, observation, stock[block.layer])
        assert not replays(block, observation, lambda x, i, w, run=stock[block.layer]: run(x, i, w * 1.001))
        assert not replays(block, observation, lambda x, i, w, run=stock[block.layer]: run(x, i.flip(-1), w))
        assert not replays(block, observation, lambda x, i, w: torch.full_like(x, float("nan")))


@pytest.mark.parametrize("fails", [False, True])
def test_the_modules_are_restored(fails: bool, opened: Opened) -> None:
    _, model, blocks = opened
    before = logits_of(model, TOKENS, MASK)
    calls = 0

    def visit(_block: MoeBlock, _observation: Observation) -> None:
        nonlocal calls
        calls += 1
        if fails:
            raise RuntimeError("in the visitor")

    if fails:
        with pytest.raises(RuntimeError, match="in the visitor"), observed(blocks, visit):
            logits_of(model, TOKENS, MASK)
        assert calls == 1
    else:
        with observed(blocks, visit):
            assert not any(_is_untouched(block) for block in blocks)
    assert all(_is_untouched(block) for block in blocks)
    seen_inside = calls
    assert torch.equal(logits_of(model, TOKENS, MASK), before)
    assert calls == seen_inside


def test_experts_of_an_unknown_form_are_refused_and_nothing_is_left_behind(opened: Opened) -> None:
    _, _, blocks = opened
    del blocks[-1].experts.act_fn
    with (
        pytest.raises(CheckpointError, match=r"has no act_fn: .* cannot be profiled yet"),
        observed(blocks, lambda block, observation: None),
    ):
        pytest.fail("the context was entered")
    assert all(_is_untouched(block) for block in blocks)


def test_experts_run_on_their_own_tokens_and_no_others(opened: Opened) -> None:
    subject, _, blocks = opened
    experts = blocks[0].experts
    inputs = torch.randn(5, subject.anatomy.hidden, generator=torch.Generator().manual_seed(0))
    inputs[4] = float("nan")  # a token that nobody is given may hold anything
    indices = torch.tensor([[0, 3], [3, 1], [0, 1], [6, 0]])
    found = {}
    for expert, token, rank, out in expert_outputs(experts, inputs, indices):
        assert (indices[token, rank] == expert).all()
        assert out.isfinite().all()
        found[expert] = token.tolist()
    assert found == {0: [0, 2, 3], 1: [1, 2], 3: [0, 1], 6: [3]}
