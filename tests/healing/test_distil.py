"""Training a block: the stock gradient, the best state, and nothing trained that should not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from moesurgeon.engine.device import Placement
from moesurgeon.healing import block, distil
from moesurgeon.healing.block import error_of, is_of, output_of, own_values
from moesurgeon.healing.distil import distilled, loss_of
from moesurgeon.healing.pace import Pace
from moesurgeon.pipeline.subject import open_subject
from tests.families.conftest import Stock
from tests.families.factory import save_checkpoint
from tests.healing.cases import SHORT, Stop, cut, stopped, with_target
from tests.laws.walks import CPU, RUNS

PACE = Pace(steps=20, tokens_per_step=256, judge_every=5, learning_rate=1e-3)


def _nothing(_done: float) -> None:
    pass


def _trained(stop: Stop, *, router: bool) -> list[str]:
    return [name for name in own_values(stop.block) if is_of(stop.block, name, router=router)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_output_and_gradient_are_the_stock_block_s(
    name: str, router: bool, padded: bool, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "_compiles_by_shape", lambda _inputs: padded)
    subject = open_subject(str(stock(name)))
    with stopped(subject, cut(subject)) as stop:
        rows, before = torch.arange(0, len(stop.train), 3), stop.block.experts.forward
        own, found = own_values(stop.block), {}
        for kind in ("stock", "ours"):
            masters = {each: own[each].clone().requires_grad_() for each in _trained(stop, router=router)}
            values = {**own, **masters}
            if kind == "ours":
                loss = loss_of(stop.block, values, stop.train, rows, CPU)
            else:
                result = functional_call(stop.block.module, values, (stop.train.inputs[rows][None],))
                result = result[0] if isinstance(result, tuple) else result
                wrong = (result[0] - stop.train.target[rows]).square().mean(-1)
                loss = (wrong * stop.train.importance[rows]).mean()
            loss.backward()
            found[kind] = loss, masters
        torch.testing.assert_close(found["ours"][0], found["stock"][0], rtol=1e-5, atol=0)
        assert any("down_proj" in each for each in found["ours"][1])
        for each, master in found["ours"][1].items():
            theirs = found["stock"][1][each].grad
            assert (master.grad is None) == (theirs is None), each
            if master.grad is not None and theirs is not None:
                torch.testing.assert_close(master.grad, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
        assert stop.block.experts.forward == before


def test_kernels_of_bfloat16_see_few_shapes(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, seen = open_subject(str(stock("mixtral"))), set[int]()
    linear = torch.nn.functional.linear

    def watched(inputs: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if len(weight) > subject.anatomy.experts:  # not the router's
            seen.add(len(inputs))
        return linear(inputs, weight, *others)

    placement = Placement(CPU, torch.bfloat16)
    with stopped(subject, cut(subject), placement=placement) as stop:
        monkeypatch.setattr(block.F, "linear", watched)
        for tokens in range(100, 300):
            output_of(stop.block, own_values(stop.block), stop.train.inputs[:tokens])
    assert len(seen) > 1 and seen <= {64, 128, 192, 256, 320}


def test_tokens_are_rounded_up_by_the_expert_s_own() -> None:
    """Those of others might overflow in it: also with no weight they would be in the sum."""
    of_expert, token = torch.tensor([0, 65, 0, 3, 0]), torch.arange(68) % 40
    weights = torch.rand(68, 1, dtype=torch.float64)
    rounded, tokens, padded = block._padded(of_expert, token, weights)
    assert rounded.tolist() == [0, 128, 0, 64, 0]
    for expert, (mine, weight) in enumerate(
        zip(tokens.split(rounded.tolist()), padded.split(rounded.tolist()), strict=True)
    ):
        own, count = token.split(of_expert.tolist())[expert], int(of_expert[expert])
        assert torch.equal(mine[:count], own) and set(mine.tolist()) == set(own.tolist())
        assert torch.equal(weight[:count], weights.split(of_expert.tolist())[expert]) and not weight[count:].any()


def test_an_error_puts_the_block_back(stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        before = stop.block.experts.forward
        with pytest.raises(RuntimeError):
            output_of(stop.block, own_values(stop.block), torch.zeros(3, 5))
        assert stop.block.experts.forward == before


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "granitemoe"])
def test_routers_learn_on_request_only(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    with stopped(subject, cut(subject)) as stop:
        own = own_values(stop.block)
        router = {each for each, tensor in stop.block.module.named_parameters()
                  if any(tensor is one for one in stop.block.router.parameters())}  # fmt: skip
        assert router and not router & set(_trained(stop, router=False)) and router <= set(_trained(stop, router=True))
        assert not any("shared_expert_gate" in each for each in _trained(stop, router=False))
        for with_router in (False, True):
            pace = replace(PACE, router=with_router)
            best, _error = distilled(stop.block, {}, stop.train, stop.heldout, pace, _nothing)
            changed = {each for each, tensor in best.items() if not torch.equal(tensor, own[each])}
            assert {"experts.gate_up_proj", "experts.down_proj"} <= changed
            assert any(each.endswith("weight") for each in changed & router) == with_router


def test_the_best_state_comes_back(stock: Stock) -> None:
    subject = open_subject(str(stock("deepseek")))
    with stopped(subject, cut(subject)) as stop:
        own = own_values(stop.block)
        before = error_of(stop.block, own, stop.heldout)
        best, error = distilled(stop.block, {}, stop.train, stop.heldout, PACE, _nothing)
        assert error < before and error == error_of(stop.block, own | best, stop.heldout)
        again, same = distilled(stop.block, {}, stop.train, stop.heldout, PACE, _nothing)
        assert same == error and all(torch.equal(again[name], best[name]) for name in best)
        other, _ = distilled(stop.block, {}, stop.train, stop.heldout, replace(PACE, seed=1), _nothing)
        assert not torch.equal(other["experts.down_proj"], best["experts.down_proj"])


@pytest.mark.parametrize("start", [{}, {"experts.down_proj": 0.9}])
def test_where_nothing_is_better_the_start_comes_back(start: dict[str, float], stock: Stock) -> None:
    """And after as many judgements as patience allows; the bar ends where it should."""
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        own, done = own_values(stop.block), []
        values = {name: own[name] * factor for name, factor in start.items()}
        pace = Pace(steps=50, tokens_per_step=64, judge_every=2, patience=3, learning_rate=10.0)
        best, error = distilled(stop.block, values, stop.train, stop.heldout, pace, done.append)
        assert best == values and error == error_of(stop.block, own | values, stop.heldout)
        assert done == [1] * 6 + [44]


def test_what_is_worse_on_held_out_tokens_is_not_taken(stock: Stock) -> None:
    subject = open_subject(str(stock("deepseek")))
    with stopped(subject, cut(subject)) as stop:
        output = output_of(stop.block, own_values(stop.block), stop.train.inputs)
        other = with_target(stop.train, 2 * output - stop.train.target)
        best, _error = distilled(stop.block, {}, stop.train, other, PACE, _nothing)
        assert best == {}


def test_masters_are_float32_whatever_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps far below a bfloat16's last bit still add up."""
    subject = open_subject(str(save_checkpoint(tmp_path / "bf16", "mixtral", dtype=torch.bfloat16)))
    with stopped(subject, cut(subject), placement=Placement(CPU, torch.bfloat16)) as stop:
        assert stop.train.inputs.dtype == torch.bfloat16
        seen: list[torch.Tensor] = []

        class Adam(torch.optim.Adam):
            def __init__(self, parameters: Any, **settings: Any) -> None:
                seen.extend(parameters := list(parameters))
                super().__init__(parameters, **settings)

        monkeypatch.setattr(distil.torch.optim, "Adam", Adam)
        before = error_of(stop.block, own_values(stop.block), stop.heldout)
        best, error = distilled(stop.block, {}, stop.train, stop.heldout, PACE, _nothing)
        assert {tensor.dtype for tensor in seen} == {torch.float32}
        assert {tensor.dtype for tensor in best.values()} == {torch.bfloat16}
        assert error < before


def test_an_expert_without_tokens_stays(stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject, top_k=1)) as stop:
        few = stop.train.at(torch.arange(1))
        alone = int(stop.train.indices[0, 0])
        best, _error = distilled(stop.block, {}, few, few, SHORT, _nothing)
        own = own_values(stop.block)
        changed = [
            not torch.equal(one, other)
            for one, other in zip(best["experts.down_proj"], own["experts.down_proj"], strict=True)
        ]
        assert changed == [expert == alone for expert in range(6)]
