"""The router's fit: products against experts that are run, losses and gradients against plain float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.engine.device import Placement
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from moesurgeon.healing import router as module
from moesurgeon.healing.block import error_of, own_values
from moesurgeon.healing.pace import Pace
from moesurgeon.healing.ridge import refitted
from moesurgeon.healing.router import Gate, Products, fit, fitted_router, hard_error, products_of, router_weight
from moesurgeon.pipeline.subject import open_subject
from tests.families.conftest import Stock
from tests.families.factory import save_checkpoint
from tests.healing.cases import SHORT, Stop, cut, healed, stopped
from tests.laws.walks import CPU, RUNS

SOFTMAX = Routing("softmax", True, 1.0, 1, 1, "max")
RULES = {
    "softmax, renormalised": SOFTMAX,
    "softmax": replace(SOFTMAX, renormalises=False, scale=1.5),
    "sigmoid, renormalised": replace(SOFTMAX, scoring="sigmoid", scale=2.5, epsilon=1e-20),
    "sigmoid, groups": replace(SOFTMAX, scoring="sigmoid", groups=3, kept_groups=2, group_score="top2"),
}
TOKENS, EXPERTS, HIDDEN = 50, 6, 10


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _case() -> tuple[Products, torch.Tensor, torch.Tensor]:
    """Return products, and what they are of: outputs [N, E, H] and targets [N, H]."""
    outputs, target = _random(TOKENS, EXPERTS, HIDDEN, seed=1), _random(TOKENS, HIDDEN, seed=2)
    parts = (
        _random(TOKENS, HIDDEN),
        0.1 * _random(1, EXPERTS, seed=4).expand(TOKENS, -1),
        torch.bmm(outputs, outputs.transpose(1, 2)),
        torch.einsum("neh,nh->ne", outputs, target),
        target.square().sum(-1),
    )
    return Products(*(part.float() for part in parts)), outputs, target


def _plain(rule: Routing, top_k: int, scores: torch.Tensor, ranked: torch.Tensor) -> torch.Tensor:
    """Return the weights [N, E] of the hard choice, token by token."""
    weights = torch.zeros_like(scores)
    for token in range(len(scores)):
        chosen = ranked[token].argsort(descending=True, stable=True)[:top_k]
        total = scores[token, chosen].sum() if rule.renormalises else 1.0
        weights[token, chosen] = rule.scale * scores[token, chosen] / total
    return weights


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", RULES)
def test_loss_and_gradient_are_those_of_plain_float64(name: str, top_k: int, biased: bool) -> None:
    rule, (products, outputs, target) = RULES[name], _case()
    bias = 0.3 * _random(EXPERTS, seed=5) if biased else None
    gate = Gate(rule, top_k, None if bias is None else bias.float())
    weight = (0.5 * _random(EXPERTS, HIDDEN, seed=3)).requires_grad_()
    logits = products.inputs.double() @ weight.T + products.offset.double()
    scores = logits.softmax(-1) if rule.scoring == "softmax" else logits.sigmoid()
    ranked = (scores if bias is None else scores + bias).clone()
    if rule.groups > 1:
        grouped = ranked.view(TOKENS, rule.groups, -1)
        lost = grouped.sum(-1).argmin(-1)  # of three groups of two experts two are kept
        outside = torch.zeros(TOKENS, rule.groups, dtype=torch.bool)
        outside[torch.arange(TOKENS), lost] = True
        ranked = grouped.masked_fill(outside[..., None], -torch.inf).view(TOKENS, -1)
    hard = _plain(rule, top_k, scores.detach(), ranked.detach())
    expected_errors = (target - torch.einsum("ne,neh->nh", hard, outputs)).square().sum(-1)
    torch.testing.assert_close(
        hard_error(weight.detach().float(), products, gate), float(expected_errors.mean()), rtol=1e-4, atol=0
    )
    if top_k == 1:
        shares = ranked.clamp(min=0) / ranked.clamp(min=0).sum(-1, keepdim=True)
        alone = torch.full_like(scores, rule.scale) if rule.renormalises else rule.scale * scores
        expected = (shares * (target[:, None] - alone[..., None] * outputs).square().sum(-1)).sum(-1)
    else:
        through = scores.detach() * (hard != 0) + scores - scores.detach()
        weights = rule.scale * (through / through.sum(-1, keepdim=True) if rule.renormalises else through)
        expected = (target - torch.einsum("ne,neh->nh", weights, outputs)).square().sum(-1)
        torch.testing.assert_close(expected, expected_errors)
    mine = weight.detach().float().requires_grad_()
    found = gate.relaxed(products.logits(mine), products)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    found.mean().backward()
    expected.mean().backward()
    assert weight.grad is not None and mine.grad is not None and weight.grad.abs().max() > 0
    torch.testing.assert_close(mine.grad.double(), weight.grad, rtol=1e-3, atol=1e-4 * float(weight.grad.abs().max()))


def test_a_softmax_top_1_is_its_expected_error() -> None:
    products, outputs, target = _case()
    weight = 0.5 * _random(EXPERTS, HIDDEN, seed=3)
    shares = (products.inputs.double() @ weight.T + products.offset.double()).softmax(-1)
    expected = (shares * (target[:, None] - outputs).square().sum(-1)).sum(-1)
    found = Gate(SOFTMAX, 1, None).relaxed(products.logits(weight.float()), products)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_it_finds_the_router_that_made_the_target(top_k: int) -> None:
    """Targets are what another router gives: from near it, most of the error goes, on tokens that it has not seen."""
    gate, truth = Gate(SOFTMAX, top_k, None), _random(EXPERTS, HIDDEN, seed=7).float()
    sets = []
    for seed in (20, 30):
        x, outputs = _random(3000, HIDDEN, seed=seed).float(), _random(3000, EXPERTS, HIDDEN, seed=seed + 1).float()
        target = torch.einsum("ne,neh->nh", gate.weights(x @ truth.T), outputs)
        sets.append(
            Products(
                x, torch.zeros(3000, EXPERTS), torch.bmm(outputs, outputs.transpose(1, 2)),
                torch.einsum("neh,nh->ne", outputs, target), target.square().sum(-1),
            )
        )  # fmt: skip
    start = truth + 0.7 * _random(EXPERTS, HIDDEN, seed=8).float()
    found = fit(start, *sets, gate)
    assert found is not None
    assert hard_error(found, sets[1], gate) < 0.5 * hard_error(start, sets[1], gate)
    again = fit(start, *sets, gate)
    assert again is not None and torch.equal(found, again)
    assert fit(truth, *sets, gate) is None  # there is nothing better than no error


def _relative(stop: Stop, values: dict[str, torch.Tensor]) -> float:
    name = router_weight(stop.block)
    assert name is not None
    gate = Gate(routing_of(stop.student.anatomy), stop.heldout.indices.shape[-1], selection_bias(stop.block))
    products = products_of(stop.block, values, stop.heldout, name)
    norm = float((stop.heldout.target.double().square().sum(-1) * stop.heldout.importance).sum())
    return hard_error(values[name].float(), products, gate) * len(stop.heldout) / norm


@pytest.mark.parametrize("top_k", [1, None])
@pytest.mark.parametrize("name", RUNS)
def test_the_error_is_the_block_s_own(name: str, top_k: int | None, stock: Stock) -> None:
    """In every family, shared experts, biases and groups included, before and after a refit and with another router."""
    subject = open_subject(str(stock(name)))
    if top_k and subject.anatomy.family.fixed_top_k is not None:
        pytest.skip("its top-k is fixed")
    with stopped(subject, cut(subject, top_k=top_k), which=1) as stop:
        own = own_values(stop.block)
        assert _relative(stop, own) == pytest.approx(error_of(stop.block, own, stop.heldout), rel=1e-3)
        better = own | refitted(stop.block, stop.train, stop.heldout)
        assert _relative(stop, better) == pytest.approx(error_of(stop.block, better, stop.heldout), rel=1e-3)
        weight = router_weight(stop.block)
        assert weight is not None
        other = better | {weight: better[weight] + 0.3 * torch.randn(better[weight].shape) * better[weight].std()}
        products = products_of(stop.block, better, stop.heldout, weight)
        gate = Gate(routing_of(stop.student.anatomy), stop.heldout.indices.shape[-1], selection_bias(stop.block))
        found = hard_error(other[weight].float(), products, gate) * len(stop.heldout)
        norm = float((stop.heldout.target.double().square().sum(-1) * stop.heldout.importance).sum())
        assert found / norm == pytest.approx(error_of(stop.block, other, stop.heldout), rel=2e-3)


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "deepseek_v3"])
def test_what_comes_back_is_better(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    with stopped(subject, cut(subject), which=1) as stop:
        own, routing = own_values(stop.block), routing_of(stop.student.anatomy)
        found = fitted_router(stop.block, {}, stop.train, stop.heldout, routing)
        assert list(found) == [router_weight(stop.block)]
        assert error_of(stop.block, own | found, stop.heldout) < error_of(stop.block, own, stop.heldout)


def test_few_tokens_are_drawn_where_products_are_large(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        hidden = subject.anatomy.hidden
        monkeypatch.setattr(module, "PRODUCTS_BYTES", 100 * module.product_bytes(6, hidden))
        few = module.sampled(stop.train, stop.block, 0)
        assert len(few) == 100
        place = (stop.train.inputs == few.inputs[50]).all(-1).nonzero().flatten()
        assert any(torch.equal(few.target[50], stop.train.target[at]) for at in place)
        again = module.sampled(stop.train, stop.block, 0)
        assert torch.equal(few.inputs, again.inputs)
        assert not torch.equal(few.inputs, module.sampled(stop.train, stop.block, 1).inputs)


@pytest.mark.parametrize("method", ["scale", "ridge", "distill"])
def test_it_is_a_step_on_request_only(method: Any, stock: Stock) -> None:
    """It stands between refit and distillation, and is kept only where it helps."""
    subject = open_subject(str(stock("mixtral")))
    for on in (False, True):
        done = healed(subject, cut(subject), method, pace=replace(SHORT, router=on))
        first = "ridge" if method == "distill" else method
        wanted = [first, *(["router"] if on else []), *(["distill"] if method == "distill" else [])]
        routers = {name for name in done.student.overlay.tensors if name.endswith("gate.weight")}
        kept = False
        for report in done.reports:
            assert [step["step"] for step in report["steps"]] == wanted
            before = report["error"]
            for step in report["steps"]:
                assert step["kept"] == (step["error"] < before)
                before = min(before, step["error"])
                kept |= step["step"] == "router" and step["kept"]
        assert bool(routers) == on and kept == on


def test_a_worse_router_is_not_taken(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesurgeon.healing import heal

    def upside_down(block: Any, *_given: Any, **_more: Any) -> dict[str, torch.Tensor]:
        name = router_weight(block)
        assert name is not None
        return {name: -own_values(block)[name]}

    monkeypatch.setattr(heal, "fitted_router", upside_down)
    done = healed(open_subject(str(stock("mixtral"))), cut(open_subject(str(stock("mixtral")))), "ridge",
                  pace=Pace(router=True))  # fmt: skip
    assert not any(report["steps"][1]["kept"] for report in done.reports)
    assert not any("gate" in name and "gate_up" not in name for name in done.student.overlay.tensors)


def test_in_bfloat16(tmp_path: Path) -> None:
    """Refit in a span and router's fit, both with float32 or better inside, on a model that computes in bfloat16."""
    subject = open_subject(str(save_checkpoint(tmp_path / "bf16", "mixtral", dtype=torch.bfloat16)))
    with stopped(subject, cut(subject), which=1, placement=Placement(CPU, torch.bfloat16)) as stop:
        own, routing = own_values(stop.block), routing_of(stop.student.anatomy)
        down = refitted(stop.block, stop.train, stop.heldout, rank=16)
        router = fitted_router(stop.block, {}, stop.train, stop.heldout, routing)
        assert {tensor.dtype for tensor in (*down.values(), *router.values())} == {torch.bfloat16} and router
        before, *after = (error_of(stop.block, own | each, stop.heldout) for each in ({}, down, router))
        assert max(after) < before
