"""The gradient of recovery is the formula's, and reaches routers that the plain loss does not.

Legend: T tokens, E experts, K experts per token, M candidates, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moesurgeon.engine.model import MoeBlock, logits_of, moe_blocks
from moesurgeon.engine.observe import expert_outputs
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from moesurgeon.pipeline.subject import Subject
from moesurgeon.recovery.estimator import learning_routers, straight_through
from moesurgeon.recovery.objective import distillation, language_loss
from moesurgeon.recovery.train import NOISE
from tests.engine.small import running, saved, small_model


def _analytic(
    routing: Routing, logits_E: torch.Tensor, chosen: list[int], candidates: list[int], pull_E: torch.Tensor
) -> torch.Tensor:
    """Return d<G, y>/dlogits [E] of the estimator for one token, term by term; ``pull`` [E] is <G, f_j>.

    weight_j = g_j / sum g with g_j = p_j for the chosen and 0 else, and dg_j = dp_j for every candidate.
    """
    p = logits_E.softmax(0) if routing.scoring == "softmax" else logits_E.sigmoid()
    total = sum(float(p[j]) for j in chosen)
    gradient = torch.zeros_like(logits_E)
    for i in range(len(logits_E)):
        if routing.scoring == "softmax":
            dp = {j: float(p[j] * (float(i == j) - p[i])) for j in candidates}
        else:
            dp = {j: float(p[j] * (1 - p[j]) * float(i == j)) for j in candidates}
        for j in candidates:
            if routing.renormalises:
                # The second term is zero for a softmax with all experts as candidates: sum dp = 0.
                inside = float(p[j]) if j in chosen else 0.0
                change = dp[j] / total - inside * sum(dp.values()) / total**2
            else:
                change = dp[j]
            gradient[i] += routing.scale * float(pull_E[j]) * change
    return gradient


@pytest.mark.parametrize("count", [None, 4])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_gradient_is_the_formula_in_float64(
    scoring: str, renormalises: bool, top_k: int, count: int | None
) -> None:
    routing = Routing(scoring, renormalises, 1.5, 1, 1, "max")
    random = torch.Generator().manual_seed(top_k)
    logits_TE = torch.randn(5, 7, dtype=torch.float64, generator=random).requires_grad_()
    outputs_TEH = torch.randn(5, 7, 11, dtype=torch.float64, generator=random)
    g_TH = torch.randn(5, 11, dtype=torch.float64, generator=random)
    scores = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    candidates_TM = scores.detach().topk(count or 7, dim=-1).indices
    chosen_TK = candidates_TM[:, :top_k]
    weights_TM = straight_through(routing, scores, chosen_TK, candidates_TM)
    # Forwards: the hard choice, exactly.
    hard = scores.detach().gather(-1, chosen_TK)
    hard = 1.5 * (hard / hard.sum(-1, keepdim=True) if renormalises else hard)
    torch.testing.assert_close(weights_TM[:, :top_k].detach(), hard, rtol=1e-14, atol=0)
    assert (weights_TM[:, top_k:] == 0).all()
    # Backwards: every candidate's output speaks.
    picked = outputs_TEH.gather(1, candidates_TM[..., None].expand(-1, -1, 11))
    (torch.einsum("tm,tmh->th", weights_TM, picked) * g_TH).sum().backward()
    assert logits_TE.grad is not None
    for token in range(5):
        pull = outputs_TEH[token] @ g_TH[token]
        expected = _analytic(
            routing, logits_TE[token].detach(), chosen_TK[token].tolist(), candidates_TM[token].tolist(), pull
        )
        torch.testing.assert_close(logits_TE.grad[token], expected, rtol=1e-10, atol=1e-12)


def test_for_a_renormalised_top_1_it_is_the_sum_over_experts_by_p1() -> None:
    """(1 / p1) sum_j <G, f_j> dp_j, written with the softmax's Jacobian."""
    routing = Routing("softmax", True, 1.0, 1, 1, "max")
    random = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(6, 8, dtype=torch.float64, generator=random).requires_grad_()
    pull_TE = torch.randn(6, 8, dtype=torch.float64, generator=random)
    order = logits_TE.detach().argsort(-1, descending=True)
    weights = straight_through(routing, logits_TE.softmax(-1), order[:, :1], order)
    (weights * pull_TE.gather(-1, order)).sum().backward()
    p = logits_TE.detach().softmax(-1)
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("tj,tji->ti", pull_TE, jacobian) / p.max(-1, keepdim=True).values
    torch.testing.assert_close(logits_TE.grad, expected, rtol=1e-12, atol=1e-14)


@dataclass
class Traced:
    """Per layer of one backward pass: logits and their gradient, the experts' input, output and G."""

    blocks: list[MoeBlock]
    logits: list[torch.Tensor]
    chosen: list[torch.Tensor]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]

    def reach(self) -> list[float]:
        """Return, per layer, sum_t |dL/dlogits_t| / sum_t |G_t| |y_t|: how much of what the loss wants
        of the block's output arrives at the router. Free of the sizes of loss, weights and batch."""
        found = []
        for logits, output in zip(self.logits, self.outputs, strict=True):
            assert logits.grad is not None
            assert output.grad is not None
            wanted = (output.grad.norm(dim=-1) * output.detach().norm(dim=-1)).sum()
            found.append(float(logits.grad.norm(dim=-1).sum() / wanted))
        return found


def _traced(
    model: PreTrainedModel, subject: Subject, candidates: int | None, loss: Callable[[], torch.Tensor]
) -> Traced:
    blocks = moe_blocks(model, subject.anatomy)
    traced = Traced(blocks, [], [], [], [])
    handles = []
    for block in blocks:
        block.router.weight.requires_grad_(True)  # type: ignore[operator]
        block.router.weight.grad = None

        def keep(_module: Any, inputs: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            traced.inputs.append(inputs[0].detach())
            traced.outputs.append(output)

        handles.append(block.experts.register_forward_hook(keep))
    with learning_routers(model, subject.anatomy, candidates=candidates) as learning:
        value = loss()
        for layer in learning.routed:
            layer.logits.retain_grad()
        value.backward()
    for handle in handles:
        handle.remove()
    traced.logits = [layer.logits for layer in learning.routed]
    traced.chosen = [layer.chosen for layer in learning.routed]
    return traced


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_experts_per_tok": 1}),
        ("mixtral", {"num_experts_per_tok": 2}),
        ("deepseek_v1", {"num_experts_per_tok": 1}),
        ("deepseek_v1", {"num_experts_per_tok": 2}),
        ("deepseek_v3", {"num_experts_per_tok": 2}),
    ],
)
def test_in_the_running_model_the_gradient_is_the_formula(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    subject = saved(small_model(family, **changes), tmp_path / "model")
    model = running(subject)
    tokens = torch.arange(40).reshape(2, 20)
    text = torch.ones_like(tokens, dtype=torch.bool)
    traced = _traced(model, subject, None, lambda: language_loss(model(input_ids=tokens).logits, tokens, text))
    routing = routing_of(subject.anatomy)
    everyone = list(range(subject.anatomy.experts))
    for number, block in enumerate(traced.blocks):
        inputs, g_TH = traced.inputs[number], traced.outputs[number].grad
        gradient = traced.logits[number].grad
        assert g_TH is not None
        assert gradient is not None
        pull_TE = torch.zeros(len(inputs), subject.anatomy.experts, dtype=torch.float64)
        with torch.no_grad():
            every_TE = torch.tensor([everyone] * len(inputs))
            for expert, token, _rank, f_TH in expert_outputs(block.experts, inputs, every_TE):
                pull_TE[token, expert] = (f_TH.double() * g_TH[token].double()).sum(-1)
        expected = torch.stack(
            [
                _analytic(
                    routing,
                    traced.logits[number][token].detach().double(),
                    traced.chosen[number][token].tolist(),
                    everyone,
                    pull_TE[token],
                )
                for token in range(len(inputs))
            ]
        )
        assert (gradient.double() - expected).norm() <= 1e-4 * expected.norm()


def test_only_the_estimator_carries_the_loss_to_a_renormalised_top_1(
    tiny_mixtral: Subject, tiny_mixtral_1: Subject
) -> None:
    """p / p = 1: what autograd returns of it is the rounding of a division.

    Thresholds for :meth:`Traced.reach`: rounding leaves about 2^-24 of what the division gets, some 1e-9
    of |G||y| after the softmax; the estimator passes the differences between experts, about 0.2 of it.
    1e-6 and 1e-3 are two orders of magnitude from both, whatever the weights.
    """
    model, teacher = running(tiny_mixtral_1), running(tiny_mixtral)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(tiny_mixtral.anatomy.config["vocab_size"], (4, 30), generator=random)
    text = torch.ones_like(tokens, dtype=torch.bool)
    wanted = logits_of(teacher, tokens, None)

    def plain() -> torch.Tensor:
        return language_loss(model(input_ids=tokens).logits, tokens, text)

    def distil() -> torch.Tensor:
        return distillation(model(input_ids=tokens).logits, wanted, text, 1.0)

    dead = _traced(model, tiny_mixtral_1, 1, plain)
    assert max(dead.reach()) < 1e-6
    norms = [block.router.weight.grad.norm() for block in dead.blocks]  # type: ignore[operator]
    assert float(torch.stack(norms).norm()) < NOISE
    assert max(_traced(model, tiny_mixtral_1, 1, distil).reach()) < 1e-6
    for loss in (plain, distil):
        assert min(_traced(model, tiny_mixtral_1, None, loss).reach()) > 1e-3


def test_a_raw_top_1_hears_the_plain_loss(tiny_deepseek_1: Subject) -> None:
    model = running(tiny_deepseek_1)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(tiny_deepseek_1.anatomy.config["vocab_size"], (4, 30), generator=random)
    text = torch.ones_like(tokens, dtype=torch.bool)
    traced = _traced(model, tiny_deepseek_1, 1, lambda: language_loss(model(input_ids=tokens).logits, tokens, text))
    assert min(traced.reach()) > 1e-3


def test_a_selection_bias_takes_part_in_the_balancing_loss(tmp_path: Path) -> None:
    """What is balanced is the choice that the block makes."""
    subject = saved(small_model("deepseek_v3", num_hidden_layers=2), tmp_path / "model")
    model = running(subject)
    with learning_routers(model, subject.anatomy, candidates=None) as learning:
        model(input_ids=torch.arange(60).reshape(3, 20), use_cache=False)
    (block,) = moe_blocks(model, subject.anatomy)
    routing = routing_of(subject.anatomy)
    scores = routing.scores(learning.routed[0].logits.detach())
    chosen = routing.choose(scores, selection_bias(block), subject.anatomy.top_k)
    assert torch.equal(learning.routed[0].chosen, chosen)
    assert not torch.equal(learning.routed[0].chosen, routing.choose(scores, None, subject.anatomy.top_k))
