"""AdaLoRA on routers: from nothing to a product of three, ranks dealt out by what they bring, and gone on from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import logits_of, moe_blocks
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.recovery.adalora import first_rank, refuse_ranks
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.targets import check_adapt, targets_of
from tests.engine.small import FAMILIES, running, saved, small_model

TOKENS = torch.arange(60).reshape(3, 20)
STEPS = 20


@contextmanager
def adapted(subject: Subject, rank: int = 2, steps: int = STEPS) -> Iterator[Adapted]:
    model = running(subject)
    with learning_routers(model, subject.anatomy, candidates=None):
        torch.manual_seed(0)
        targets = targets_of(model, subject.anatomy, ("routers",))
        yield Adapted(model, targets, rank=rank, kind="adalora", steps=steps)


@pytest.fixture(params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return saved(small_model(request.param), tmp_path / "model")


@pytest.fixture
def mixtral(tmp_path: Path) -> Subject:
    return saved(small_model("mixtral"), tmp_path / "model")


def moved(these: Adapted) -> None:
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in these.weights():
            weight.add_(torch.empty_like(weight).normal_(0.0, 0.2, generator=random))


def test_it_starts_from_what_the_model_computed(subject: Subject) -> None:
    expected = logits_of(running(subject), TOKENS, None)
    with adapted(subject) as these:
        assert torch.equal(logits_of(these.model, TOKENS, None), expected)
        logits = these.model(input_ids=TOKENS, use_cache=False).logits
        assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
        learning = [name for name, each in these.model.named_parameters() if each.requires_grad]
        assert len(learning) == len(these.weights()) == 3 * len(subject.anatomy.moe_layers)
        assert all(".gate.linear.lora_" in name for name in learning)


def test_what_is_merged_is_what_ran_and_the_product_of_three_in_float64(subject: Subject) -> None:
    with adapted(subject) as these:
        moved(these)
        start, merged = running(subject), dict(these.merged())
        for name, weight in merged.items():
            down, values, up = (each.detach().double() for each in these.svd.factors(name))
            assert down.shape == (3, 32) and up.shape == (8, 3)
            scale = 2 * 3 / (3 + 1e-5)  # alpha by the rank at first, as peft divides
            delta = scale * up @ torch.diag(values[:, 0]) @ down
            expected = start.get_parameter(name).double() + delta
            torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
            two_down, two_up = (each.double() for each in these.svd.plain(name))
            torch.testing.assert_close(two_up @ two_down, delta, rtol=1e-5, atol=1e-6)
        logits = logits_of(these.model, TOKENS, None)
        with torch.no_grad():
            for name, weight in merged.items():
                start.get_parameter(name).copy_(weight)
        torch.testing.assert_close(logits, logits_of(start, TOKENS, None), rtol=1e-4, atol=1e-4)
        assert (logits - logits_of(running(subject), TOKENS, None)).abs().max() > 0.01
        with these.running_with(merged):
            assert torch.equal(logits_of(these.model, TOKENS, None), logits_of(start, TOKENS, None))
        with these.off():
            assert torch.equal(logits_of(these.model, TOKENS, None), logits_of(running(subject), TOKENS, None))


def test_the_penalty_is_how_far_the_factors_are_from_orthogonal_in_float64(mixtral: Subject) -> None:
    with adapted(mixtral) as these:
        assert these.svd.penalty().item() < 1e-9
        moved(these)
        terms = []
        for target in these.targets:
            down, _, up = (each.detach().double() for each in these.svd.factors(target.name))
            gaps = down @ down.T - torch.eye(3), up.T @ up - torch.eye(3)
            terms.append(sum(float((gap**2).sum()) for gap in gaps))
        assert these.svd.penalty().item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        these.regularise()
        down, values, up = these.svd.factors(these.targets[0].name)
        # d |A A' - 1|^2 = 4 (A A' - 1) A dA; a third of it, of three routers, times the coefficient
        expected = 0.1 / 3 * 4 * (down @ down.T - torch.eye(3)) @ down
        torch.testing.assert_close(down.grad, expected, rtol=1e-4, atol=1e-6)
        assert values.grad is None or not values.grad.any()


def _train(these: Adapted, optimizer: torch.optim.Optimizer, steps: range, layer: str) -> None:
    """Take steps towards a router of ``layer`` that is far away in every direction; the others are nearly there."""
    for step in steps:
        loss = torch.zeros(())
        for target in these.targets:
            down, values, up = these.svd.factors(target.name)
            wanted = (0.5 if layer in target.name else 0.05) * torch.eye(8, 32)
            loss = loss + (up @ (values * down) - wanted).square().sum()
        loss.backward()
        these.regularise()
        optimizer.step()
        these.allocate(step)
        optimizer.zero_grad()


def test_ranks_go_to_the_router_that_needs_them(mixtral: Subject) -> None:
    with adapted(mixtral, steps=60) as these:
        optimizer = torch.optim.Adam(these.weights(), 3e-2)
        _train(these, optimizer, range(1, 61), "layers.1.")
        ranks = these.svd.ranks()
        assert sum(ranks.values()) == 2 * 3
        assert ranks["1"] == 3 > max(ranks["0"], ranks["2"])
        for number, target in enumerate(these.targets):
            assert torch.linalg.matrix_rank(these.svd.delta(target.name), rtol=1e-3) == ranks[str(number)]


@pytest.mark.parametrize("done", [1, 9, 15])
def test_it_goes_on_where_it_was_to_the_bit(done: int, mixtral: Subject) -> None:
    """Before ranks fall, while they do, and after."""
    state: dict[str, Any] = {}
    with adapted(mixtral) as these:
        optimizer = torch.optim.Adam(these.weights(), 3e-2)
        _train(these, optimizer, range(1, done + 1), "layers.0.")
        state = copy.deepcopy(
            {"weights": these.state(), "optimizer": optimizer.state_dict(), "ranks": these.svd.state()}
        )
        _train(these, optimizer, range(done + 1, STEPS + 1), "layers.0.")
        expected, ranks = these.state(), these.svd.ranks()
    with adapted(mixtral) as these:
        optimizer = torch.optim.Adam(these.weights(), 3e-2)
        these.load(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        these.svd.load(state["ranks"])
        _train(these, optimizer, range(done + 1, STEPS + 1), "layers.0.")
        assert these.svd.ranks() == ranks
        assert all(torch.equal(weight, expected[name]) for name, weight in these.state().items())


def test_the_routers_own_child_is_asked_in_bfloat16_too(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral").to(torch.bfloat16), tmp_path / "model")
    model = running(subject, Placement(torch.device("cpu"), torch.bfloat16))
    with learning_routers(model, subject.anatomy, candidates=None):
        these = Adapted(model, targets_of(model, subject.anatomy, ("routers",)), rank=2, kind="adalora", steps=STEPS)
        assert {weight.dtype for weight in these.weights()} == {torch.float32}
        before = logits_of(these.model, TOKENS, None)
        moved(these)
        after = logits_of(these.model, TOKENS, None)
        assert after.dtype == torch.bfloat16 and not torch.equal(before, after)
    assert all("linear" in block.router._modules for block in moe_blocks(model, subject.anatomy))


def test_what_leaves_nothing_to_choose_is_refused(mixtral: Subject) -> None:
    assert (first_rank(1, 8, 32), first_rank(4, 8, 32), first_rank(7, 8, 32)) == (2, 6, 8)
    refuse_ranks(mixtral.anatomy, 7, 10)
    with pytest.raises(UsageError, match="a router of 8 experts has 8 at most; give a lower --rank"):
        refuse_ranks(mixtral.anatomy, 8, 10)
    with pytest.raises(UsageError, match="give at least --steps 10"):
        refuse_ranks(mixtral.anatomy, 2, 9)
    for adapt in (("experts",), ("routers", "experts"), ("full-routers",)):
        with pytest.raises(UsageError, match="--adapter adalora is for --adapt routers alone"):
            check_adapt(adapt, "adalora")
    check_adapt(("routers",), "adalora")
