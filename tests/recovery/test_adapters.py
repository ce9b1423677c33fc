"""What is trained, merged, is what ran; running with other weights leaves no trace; masters keep small steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import logits_of, moe_blocks
from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.targets import Adapt, as_stored, check_adapt, refuse_unwritable, targets_of
from moesurgeon.surgery.plan import identity
from tests.engine.small import running, saved, small_model, source_of

TOKENS = torch.arange(40).reshape(2, 20)
ADAPT: list[tuple[Adapt, ...]] = [("routers",), ("full-routers",), ("experts",), ("full-routers", "experts-all")]


class Moved:
    """A model of which everything that is trained has moved."""

    def __init__(self, subject: Subject, adapt: tuple[Adapt, ...]) -> None:
        self.subject, self.model = subject, running(subject)
        self.adapted = Adapted(self.model, targets_of(self.model, subject.anatomy, adapt), rank=3)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.adapted.weights():
                weight.add_(torch.empty_like(weight).normal_(0.0, 0.2, generator=random))

    def plain(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the logits of a fresh model with these weights."""
        return logits_of(self.fresh(tensors), TOKENS, None)

    def fresh(self, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
        fresh = running(self.subject)
        for name, weight in tensors.items():
            fresh.get_parameter(name).data.copy_(weight)
        return fresh


@pytest.fixture(params=ADAPT, ids="+".join)
def moved(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Moved]:
    yield Moved(saved(small_model("deepseek_v3"), tmp_path / "model"), request.param)


def test_merged_weights_are_what_the_adapted_model_runs_with(moved: Moved) -> None:
    tensors = dict(moved.adapted.merged())
    assert list(tensors) == [target.name for target in moved.adapted.targets]
    logits = logits_of(moved.model, TOKENS, None)
    torch.testing.assert_close(logits, moved.plain(tensors), rtol=1e-4, atol=1e-4)
    assert (logits - moved.plain({})).abs().max() > 0.01


def test_the_change_is_twice_up_times_down_of_each_expert_in_float64(tmp_path: Path) -> None:
    """peft's order of the factors, written out: down [E x R, in], up [out, R x E], scaled by alpha / R = 2."""
    moved = Moved(saved(small_model("mixtral"), tmp_path / "model"), ("experts-all",))
    start = running(moved.subject)
    for target, merged in zip(moved.adapted.targets, dict(moved.adapted.merged()).values(), strict=True):
        down, up = (each.detach().double() for each in moved.adapted._trained(target))
        for expert in range(8):
            mine = slice(3 * expert, 3 * expert + 3)
            delta = 2.0 * up[:, expert::8] @ down[mine]
            expected = start.get_parameter(target.name)[expert].double() + delta
            torch.testing.assert_close(merged[expert].double(), expected, rtol=1e-5, atol=1e-6)


def test_off_is_the_model_from_before(moved: Moved) -> None:
    with moved.adapted.off():
        assert torch.equal(logits_of(moved.model, TOKENS, None), moved.plain({}))


def test_running_with_weights_is_a_model_that_has_them(moved: Moved) -> None:
    other = {name: weight.flip(0).contiguous() for name, weight in moved.adapted.merged()}
    before = logits_of(moved.model, TOKENS, None)
    with moved.adapted.running_with(other):
        assert torch.equal(logits_of(moved.model, TOKENS, None), moved.plain(other))
    assert torch.equal(logits_of(moved.model, TOKENS, None), before)


def test_one_part_runs_without_the_other(tmp_path: Path) -> None:
    moved = Moved(saved(small_model("mixtral"), tmp_path / "model"), ("routers", "experts"))
    for part, word in (("routers", "gate"), ("experts", "experts")):
        tensors = dict(moved.adapted.merged((part,)))
        assert all(word in name for name in tensors) and tensors
        with moved.adapted.running_with(tensors):
            assert torch.equal(logits_of(moved.model, TOKENS, None), moved.plain(tensors))


def test_an_error_inside_leaves_everything_in_place(moved: Moved) -> None:
    before = logits_of(moved.model, TOKENS, None)
    learning = {name for name, parameter in moved.adapted.model.named_parameters() if parameter.requires_grad}
    zeros = {name: torch.zeros_like(weight) for name, weight in moved.adapted.merged()}
    with pytest.raises(RuntimeError, match="inside"), moved.adapted.running_with(zeros):
        raise RuntimeError("inside")
    assert torch.equal(logits_of(moved.model, TOKENS, None), before)
    named = moved.adapted.model.named_parameters()
    assert {name for name, parameter in named if parameter.requires_grad} == learning


def test_a_state_brings_everything_back(moved: Moved) -> None:
    state, before = moved.adapted.state(), logits_of(moved.model, TOKENS, None)
    with torch.no_grad():
        for weight in moved.adapted.weights():
            weight.zero_()
    assert not torch.equal(logits_of(moved.model, TOKENS, None), before)
    moved.adapted.load(state)
    assert torch.equal(logits_of(moved.model, TOKENS, None), before)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_only_chosen_experts_move(family: str, tmp_path: Path) -> None:
    """Those that every token goes to are not among them."""
    subject = saved(small_model(family), tmp_path / "model")
    model = running(subject)
    chosen = {0: frozenset({1, 4}), 1: frozenset({2}), 2: frozenset(), 3: frozenset(range(8))}
    with learning_routers(model, subject.anatomy, candidates=None):
        adapted = Adapted(model, targets_of(model, subject.anatomy, ("experts-all",)), rank=2, experts=chosen)
        optimizer = torch.optim.AdamW(adapted.weights(), lr=0.1, weight_decay=0.0)
        for _ in range(2):
            with adapted.off():  # peft takes the gradients away for that long
                pass
            adapted.model(input_ids=TOKENS, use_cache=False).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    start = running(subject)
    for target, (name, weight) in zip(adapted.targets, adapted.merged(), strict=True):
        if weight.dim() == 2:
            assert "shared" in name and torch.equal(weight, start.get_parameter(name))
            continue
        differs = {e for e in range(8) if not torch.equal(weight[e], start.get_parameter(name)[e])}
        assert differs == chosen[target.layer], name


@pytest.mark.parametrize("adapt", [("full-routers",), ("routers", "experts")], ids="+".join)
def test_what_is_trained_is_float32_whatever_runs(adapt: tuple[Adapt, ...], tmp_path: Path) -> None:
    """A step far below bfloat16's last place is not lost: two hundred of them arrive."""
    subject = saved(small_model("mixtral").to(torch.bfloat16), tmp_path / "model")
    model = running(subject, Placement(torch.device("cpu"), torch.bfloat16))
    adapted = Adapted(model, targets_of(model, subject.anatomy, adapt), rank=2)
    assert {weight.dtype for weight in adapted.weights()} == {torch.float32}
    start = dict(adapted.merged())
    with torch.no_grad():
        for _ in range(200):
            for weight in adapted.weights():
                weight.add_(weight.abs() * 1e-4 + 1e-5)
    assert adapted.model(input_ids=TOKENS, use_cache=False).logits.dtype == torch.bfloat16
    student = Stream(source_of(subject), Overlay(plan=identity(subject.anatomy)))
    for name, weight in adapted.merged():
        stored = as_stored(student, name, weight)
        assert stored.dtype == torch.bfloat16
        assert not torch.equal(stored.float(), start[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_weights_have_the_dtype_that_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    subject = saved(small_model("mixtral").to(dtype), tmp_path / "model")
    model = running(subject)
    adapted = Adapted(model, targets_of(model, subject.anatomy, ("routers", "experts")), rank=2)
    student = Stream(source_of(subject), Overlay(plan=identity(subject.anatomy)))
    for name, weight in adapted.merged():
        stored = as_stored(student, name, weight)
        assert stored.dtype == dtype
        assert torch.equal(stored.float(), running(subject).get_parameter(name))  # adapters start at zero


@pytest.mark.parametrize(
    ("adapt", "says"),
    [
        ((), "nothing is named"),
        (("router",), "--adapt router is not one of routers, full-routers, experts, experts-all"),
        (("routers", "full-routers"), "exclude each other"),
        (("experts", "experts-all"), "exclude each other"),
    ],
)
def test_names_that_say_nothing_or_two_things_are_refused(adapt: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_adapt(adapt)


def test_experts_that_are_held_otherwise_are_refused(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral"), tmp_path / "model")
    model = running(subject)
    for block in moe_blocks(model, subject.anatomy):
        del block.experts.down_proj
    with pytest.raises(CheckpointError, match="not held as one down_proj, so they cannot be adapted"):
        targets_of(model, subject.anatomy, ("experts",))


def test_a_dtype_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral").to(torch.float64), tmp_path / "model")
    model = running(subject)
    student = Stream(source_of(subject), Overlay(plan=identity(subject.anatomy)))
    with pytest.raises(CheckpointError, match="is stored as F64; only BF16, F16, F32 can be trained"):
        refuse_unwritable(student, targets_of(model, subject.anatomy, ("experts",)))
