"""Refits against plain least squares in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moesurgeon.healing.block import error_of, output_of, own_values
from moesurgeon.healing.data import BlockData
from moesurgeon.healing.ridge import LAMBDAS, refitted
from moesurgeon.pipeline.subject import open_subject
from tests.families.conftest import Stock
from tests.healing.cases import Stop, cut, stopped, with_target

# By family: the shared experts' module, and the gate on it.
SHARED = {
    "mixtral": None,
    "deepseek": ("shared_experts", None),
    "deepseek_v3": ("shared_experts", None),
    "qwen2_moe": ("shared_expert", "shared_expert_gate"),
    "glm4_moe": ("shared_experts", None),
    "ernie4_5_moe": ("shared_experts", None),
    "granitemoe": None,
}


def _fed(stop: Stop, name: str, data: BlockData) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return, for each expert and then the shared ones: tokens, what the down projection is fed, and itself."""
    experts: Any = stop.block.experts
    x = data.inputs.double()
    found = []
    for expert in range(len(experts.down_proj)):
        tokens, rank = torch.where(data.indices == expert)
        gate, up = (x[tokens] @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
        fed = experts.act_fn(gate) * up * data.weights[tokens, rank, None].double()
        found.append((tokens, fed, experts.down_proj[expert].double()))
    if (shared := SHARED[name]) is not None:
        module: Any = stop.block.module.get_submodule(shared[0])
        fed = module.act_fn(x @ module.gate_proj.weight.double().T) * (x @ module.up_proj.weight.double().T)
        if shared[1]:
            fed *= (x @ stop.block.module.get_submodule(shared[1]).weight.double().T).sigmoid()
        found.append((torch.arange(len(x)), fed, module.down_proj.weight.double()))
    return found


def _reference(stop: Stop, name: str, method: str, sweeps: int) -> tuple[list[torch.Tensor], list[float]]:
    """Return the new weights, and the squared error on the training tokens after every part."""
    sets = [_fed(stop, name, data) for data in (stop.train, stop.heldout)]
    missing = []
    for parts, data in zip(sets, (stop.train, stop.heldout), strict=True):
        output = torch.zeros_like(data.target, dtype=torch.float64)
        for tokens, fed, weight in parts:
            output[tokens] += fed @ weight.T
        missing.append(data.target.double() - output)
    # Squares count by importance: of what is fed and of what is missing its root.
    roots = [data.importance.double().sqrt()[:, None] for data in (stop.train, stop.heldout)]
    missing = [each * root for each, root in zip(missing, roots, strict=True)]
    sets = [
        [(tokens, fed * root[tokens], weight) for tokens, fed, weight in parts]
        for parts, root in zip(sets, roots, strict=True)
    ]
    weights, errors = [weight for _tokens, _fed, weight in sets[0]], []
    for _sweep in range(sweeps):
        for part in range(len(weights)):
            (tokens, fed, _), (held_tokens, held, _) = sets[0][part], sets[1][part]
            changes = [torch.zeros_like(weights[part])]
            if method == "scale":
                own = fed @ weights[part].T
                a = (own * (missing[0][tokens] + own)).sum() / (own * own).sum()
                changes.append((a - 1) * weights[part])
            for strength in LAMBDAS if method == "ridge" else ():
                width = fed.shape[1]
                ridge = (strength * (fed * fed).sum(0).mean()).sqrt() * torch.eye(width, dtype=torch.float64)
                wanted = torch.cat([missing[0][tokens], torch.zeros(width, len(weights[part]), dtype=torch.float64)])
                changes.append(torch.linalg.lstsq(torch.cat([fed, ridge]), wanted).solution.T)
            change = min(changes, key=lambda each: float((missing[1][held_tokens] - held @ each.T).square().sum()))
            weights[part] = weights[part] + change
            missing[0][tokens] -= fed @ change.T
            missing[1][held_tokens] -= held @ change.T
            errors.append(float(missing[0].square().sum()))
    return weights, errors


@pytest.mark.parametrize("method", ["ridge", "scale"])
@pytest.mark.parametrize("name", SHARED)
def test_a_refit_is_least_squares(name: str, method: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    with stopped(subject, cut(subject), which=1) as stop:
        found = refitted(stop.block, stop.train, stop.heldout, method=method)
        expected, _ = _reference(stop, name, method, 2 if method == "ridge" else 1)
        down = found.pop(next(key for key in found if key.endswith(".down_proj")))
        tensors = [*down, *found.values()]
        assert len(found) == (SHARED[name] is not None)
        assert any(not torch.equal(one, other) for one, other in zip(down, stop.block.experts.down_proj, strict=True))
        for mine, theirs in zip(tensors, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.std()))


@pytest.mark.parametrize("name", SHARED)
def test_what_the_parts_bring_is_what_the_block_gives(name: str, stock: Stock) -> None:
    """The error that the sums promise is the block's own: routing weights, gates and all."""
    subject = open_subject(str(stock(name)))
    with stopped(subject, cut(subject), which=1) as stop:
        found = refitted(stop.block, stop.train, stop.heldout)
        _weights, errors = _reference(stop, name, "ridge", 2)
        norm = float((stop.train.target.double().square().sum(-1) * stop.train.importance).sum())
        after = error_of(stop.block, own_values(stop.block) | found, stop.train)
        assert after == pytest.approx(errors[-1] / norm, rel=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_every_sweep_leaves_less(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    with stopped(subject, cut(subject), which=1) as stop:
        own = own_values(stop.block)
        errors = [
            error_of(stop.block, own | refitted(stop.block, stop.train, stop.train, sweeps=sweeps), stop.train)
            for sweeps in range(5)
        ]
        assert errors == sorted(errors, reverse=True) and errors[1] > errors[3]
        _, by_part = _reference(stop, name, "ridge", 3)
        assert by_part == sorted(by_part, reverse=True)


@pytest.mark.parametrize("method", ["ridge", "scale"])
def test_what_is_worse_on_held_out_tokens_is_not_taken(method: str, stock: Stock) -> None:
    """What would have to be added there is the opposite of what there is to learn."""
    subject = open_subject(str(stock("deepseek")))
    with stopped(subject, cut(subject)) as stop:
        output = output_of(stop.block, own_values(stop.block), stop.train.inputs)
        other = with_target(stop.train, 2 * output - stop.train.target)
        found = refitted(stop.block, stop.train, other, method=method)
        own = own_values(stop.block)
        assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())


@pytest.mark.parametrize("without", ["train", "heldout"])
def test_an_expert_without_tokens_stays(without: str, stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        sets = {"train": stop.train, "heldout": stop.heldout}
        data = sets[without]
        others = torch.where(data.indices == 3, 4, data.indices)
        sets[without] = replace(data, indices=others)
        (down,) = refitted(stop.block, **sets).values()
        before: Any = stop.block.experts.down_proj
        assert torch.equal(down[3], before[3]) and not torch.equal(down[5], before[5])


def test_dead_activations_change_nothing(stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        experts: Any = stop.block.experts
        experts.gate_up_proj.data[2] = 0
        for method in ("ridge", "scale"):
            (down,) = refitted(stop.block, stop.train, stop.heldout, method=method).values()
            assert torch.equal(down[2], experts.down_proj[2]) and down.isfinite().all()
