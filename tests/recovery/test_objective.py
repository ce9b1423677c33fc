"""The losses of recovery against plain formulas, and which are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.routing import Routing
from moesurgeon.errors import UsageError
from moesurgeon.recovery.estimator import Routed
from moesurgeon.recovery.objective import (
    Losses,
    distillation,
    language_loss,
    refuse_without_gradient,
)
from moesurgeon.recovery.share import Share
from moesurgeon.recovery.teacher import Said
from moesurgeon.recovery.terms import Heard, Sums, sums_of
from moesurgeon.surgery.anatomy import Anatomy, examine
from tests.engine.small import FAMILIES, small_model

RANDOM = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (torch.randn(3, 7, 11, generator=RANDOM) for _ in range(2))
TOKENS = torch.randint(11, (3, 7), generator=RANDOM)
TEXT = torch.ones(3, 7, dtype=torch.bool)
TEXT[1, 5:] = False
TEXT[2, 2:] = False


def _softmax(values: np.ndarray) -> np.ndarray:
    return np.exp(values) / np.exp(values).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_mean_divergence_of_text(temperature: float) -> None:
    total, count = 0.0, 0
    for row, place in TEXT.nonzero().tolist():
        p, q = (_softmax(one[row, place].double().numpy() / temperature) for one in (STUDENT, TEACHER))
        total += float((q * np.log(q / p)).sum())
        count += 1
    loss = distillation(STUDENT, TEACHER, TEXT, temperature)
    assert float(loss) == pytest.approx(temperature**2 * total / count, rel=1e-5)
    assert float(distillation(TEACHER, TEACHER, TEXT, temperature)) == pytest.approx(0.0, abs=1e-7)


def test_the_language_loss_predicts_text_from_what_is_before_it() -> None:
    losses = [
        -np.log(_softmax(STUDENT[row, place - 1].double().numpy())[int(TOKENS[row, place])])
        for row, place in TEXT.nonzero().tolist()
        if place > 0
    ]
    assert float(language_loss(STUDENT, TOKENS, TEXT)) == pytest.approx(np.mean(losses), rel=1e-5)


def test_padding_is_in_no_loss() -> None:
    noise = torch.where(TEXT[..., None], STUDENT, torch.full_like(STUDENT, 77.0))
    tokens = torch.where(TEXT, TOKENS, torch.zeros_like(TOKENS))
    assert torch.equal(distillation(noise, TEACHER, TEXT, 1.0), distillation(STUDENT, TEACHER, TEXT, 1.0))
    assert torch.equal(language_loss(noise, tokens, TEXT), language_loss(STUDENT, TOKENS, TEXT))


def _routing(scoring: str = "softmax") -> Routing:
    return Routing(scoring, True, 1.0, 1, 1, "max")


def _sums(
    losses: Losses,
    routed: list[Routed],
    said: Said | None = None,
    hidden: Sequence[torch.Tensor] = (),
    *,
    scoring: str = "softmax",
    text: torch.Tensor = TEXT,
) -> Sums:
    """What the terms of a batch of made-up logits add up to, beside the language-model loss."""
    batch = Batch("text", (), torch.zeros(text.shape, dtype=torch.long), text.long())
    heard = Heard(torch.zeros(*text.shape, 11), routed, hidden)
    return sums_of(losses, _routing(scoring), heard, said or Said(), Share(batch), routers=True)


LM = Losses(objective="lm", balance=1.0, router=1.0, hidden=1.0, z=1.0)
BALANCE = replace(LM, router=0.0, hidden=0.0, z=0.0)


def _balance(routed: list[Routed], scoring: str = "softmax", text: torch.Tensor = TEXT) -> float:
    return _sums(BALANCE, routed, scoring=scoring, text=text).figures["balance"]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_balancing_loss_is_that_of_switch_transformers_layer_by_layer(scoring: str) -> None:
    layers = [torch.randn(21, 5, generator=RANDOM) for _ in range(2)]
    routed = [Routed(logits, torch.randint(5, (21, 2), generator=RANDOM)) for logits in layers]
    losses = []
    for layer in routed:
        chosen, share = np.zeros(5), np.zeros(5)
        for token in TEXT.flatten().nonzero().flatten().tolist():
            values = layer.logits[token].double().numpy()
            scores = np.exp(values) if scoring == "softmax" else 1 / (1 + np.exp(-values))
            share += scores / scores.sum()
            for expert in layer.chosen[token].tolist():
                chosen[expert] += 1
        losses.append(5 * float((chosen / chosen.sum() * share / int(TEXT.sum())).sum()))
    assert _balance(routed, scoring) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_balancing_loss_is_one_for_even_use_and_more_for_a_favourite() -> None:
    text = torch.ones(1, 8, dtype=torch.bool)
    even = Routed(torch.zeros(8, 4), torch.arange(8)[:, None] % 4)
    favourite = Routed(torch.tensor([[9.0, 0, 0, 0]]).repeat(8, 1), torch.zeros(8, 1, dtype=torch.long))
    other = Routed(torch.tensor([[0, 9.0, 0, 0]]).repeat(8, 1), torch.ones(8, 1, dtype=torch.long))
    assert _balance([even], text=text) == pytest.approx(1.0)
    assert _balance([favourite], text=text) > 3.9
    # Two lopsided layers do not cancel.
    assert _balance([favourite, other], text=text) > 3.9


def test_the_balancing_loss_pulls_away_from_the_favourite() -> None:
    logits = torch.tensor([[1.0, 0, 0, 0]]).repeat(8, 1).requires_grad_()
    routed = [Routed(logits, torch.zeros(8, 1, dtype=torch.long))]
    _sums(BALANCE, routed, text=torch.ones(1, 8, dtype=torch.bool)).beside.backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def _distribution(scoring: str, values: np.ndarray) -> np.ndarray:
    scores = np.exp(values) if scoring == "softmax" else 1 / (1 + np.exp(-values))
    return scores / scores.sum()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_router_distillation_is_the_divergence_of_the_scores(scoring: str) -> None:
    routed = [Routed(torch.randn(21, 5, generator=RANDOM), torch.zeros(21, 1, dtype=torch.long)) for _ in range(2)]
    rows = TEXT.flatten()
    teacher = [torch.randn(int(rows.sum()), 5, generator=RANDOM) for _ in range(2)]
    total = []
    for layer, wanted in zip(routed, teacher, strict=True):
        for mine, theirs in zip(layer.logits[rows].double().numpy(), wanted.double().numpy(), strict=True):
            p, q = _distribution(scoring, mine), _distribution(scoring, theirs)
            total.append(float((q * np.log(q / p)).sum()))
    losses = replace(LM, hidden=0.0)
    found = _sums(losses, routed, Said(routers=teacher), scoring=scoring).figures["router"]
    assert found == pytest.approx(np.mean(total), rel=1e-5)
    same = [layer.logits[rows] for layer in routed]
    assert _sums(losses, routed, Said(routers=same), scoring=scoring).figures["router"] == pytest.approx(0.0, abs=1e-6)


def test_the_z_loss_is_the_mean_square_of_the_log_sum() -> None:
    routed = [Routed(torch.randn(21, 5, generator=RANDOM), torch.zeros(21, 1, dtype=torch.long)) for _ in range(2)]
    logits = np.concatenate([layer.logits[TEXT.flatten()].double().numpy() for layer in routed])
    found = _sums(replace(BALANCE, z=1.0), routed).figures["z"]
    assert found == pytest.approx(np.mean(np.log(np.exp(logits).sum(-1)) ** 2), rel=1e-5)


def test_the_hidden_loss_is_relative_to_the_teacher_layer_by_layer() -> None:
    student = [torch.randn(3, 7, 4, generator=RANDOM) for _ in range(2)]
    teacher = [scale * torch.randn(int(TEXT.sum()), 4, generator=RANDOM) for scale in (1.0, 100.0)]
    expected = [
        float((mine[TEXT] - wanted).double().square().sum() / wanted.double().square().sum())
        for mine, wanted in zip(student, teacher, strict=True)
    ]
    routed = [Routed(torch.zeros(21, 5), torch.zeros(21, 1, dtype=torch.long))]
    sums = _sums(replace(LM, router=0.0), routed, Said(hidden=teacher), student)
    assert sums.figures["hidden"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(sums.main) == pytest.approx(sums.figures["lm"] + np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("routers", [True, False])
def test_terms_are_added_with_their_coefficients(routers: bool) -> None:
    """What is for routers is left out where none are trained."""
    batch = Batch("text", (), TOKENS, TEXT.long())
    routed = [Routed(torch.randn(21, 5, generator=RANDOM), torch.zeros(21, 1, dtype=torch.long))]
    said = Said(
        logits=TEACHER,
        routers=[torch.randn(int(TEXT.sum()), 5, generator=RANDOM)],
        hidden=[torch.randn(int(TEXT.sum()), 4, generator=RANDOM)],
    )
    heard = Heard(STUDENT, routed, [torch.randn(3, 7, 4, generator=RANDOM)])
    losses = Losses(temperature=2.0, lm=0.3, router=0.5, hidden=0.7, balance=0.2, z=0.1)
    terms = sums_of(losses, _routing(), heard, said, Share(batch), routers=routers)
    each = terms.figures
    assert each["kl"] == pytest.approx(float(distillation(STUDENT, TEACHER, TEXT, 2.0)))
    main = each["kl"] + 0.3 * each["lm"] + 0.5 * each["router"] + 0.7 * each["hidden"]
    assert float(terms.main) == pytest.approx(main, rel=1e-6) == pytest.approx(each["loss"], rel=1e-6)
    beside = 0.2 * each["balance"] + 0.1 * each["z"] if routers else 0.0
    assert float(terms.beside) == pytest.approx(beside, rel=1e-6)
    plain = sums_of(Losses(objective="lm", lm=9.0), _routing(), heard, Said(), Share(batch), routers=routers)
    assert float(plain.main) == pytest.approx(float(language_loss(STUDENT, TOKENS, TEXT)), rel=1e-6)
    assert set(plain.figures) == {"loss", "lm", "balance"}


def _anatomy(family: str, **changes: Any) -> Anatomy:
    """The anatomy of a small model as transformers would save it, by its config alone."""
    config = small_model(family, **changes).config.to_dict()
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight" if family == "mixtral" else None
    return examine(config, {name or "model.layers.1.mlp.experts.0.up_proj.weight": None})  # type: ignore[dict-item]


# Where a single weight is divided by itself.
DEAD = [("mixtral", {}), ("deepseek_v3", {}), ("qwen2_moe", {"norm_topk_prob": True})]
ALIVE = [
    ("deepseek_v1", {}),
    ("deepseek_v1", {"norm_topk_prob": True}),  # v1 never divides a single weight
    ("deepseek_v2", {}),
    ("deepseek_v2", {"norm_topk_prob": True}),  # which V2 ignores
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("qwen2_moe", {}),
]


@pytest.mark.parametrize(("family", "changes"), DEAD)
def test_the_plain_loss_is_refused_for_a_renormalised_top_1(family: str, changes: dict[str, Any]) -> None:
    anatomy = _anatomy(family, num_experts_per_tok=1, **changes)
    with pytest.raises(UsageError, match="use --objective distill"):
        refuse_without_gradient(anatomy, Losses(objective="lm"))
    refuse_without_gradient(anatomy, Losses())
    # What reaches the router by another way, and what trains no router.
    refuse_without_gradient(anatomy, Losses(objective="lm", router=0.1))
    refuse_without_gradient(anatomy, Losses(objective="lm"), ("experts",))
    refuse_without_gradient(_anatomy(family, num_experts_per_tok=2, **changes), Losses(objective="lm"))


@pytest.mark.parametrize(("family", "changes"), ALIVE)
def test_it_is_accepted_where_the_weight_depends_on_the_router(family: str, changes: dict[str, Any]) -> None:
    refuse_without_gradient(_anatomy(family, num_experts_per_tok=1, **changes), Losses(objective="lm"))


def test_every_family_is_one_or_the_other() -> None:
    assert {family for family, _ in DEAD + ALIVE} == set(FAMILIES)
