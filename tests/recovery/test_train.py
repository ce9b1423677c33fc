"""The order of the text, the pace of the learning, and what is reported of a run."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace

import pytest
import torch

from moesurgeon.cli.recover import command
from moesurgeon.engine.batches import rows_for
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.recipe import RecoverStep
from moesurgeon.pipeline.recover import RecoverSpec
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.schedule import Schedule, endless, in_sampled_order, pace
from moesurgeon.recovery.train import NOISE, refuse_noise
from tests.engine.small import corpus_of, random_windows

CPU = torch.device("cpu")


def test_every_epoch_holds_every_window_once_in_another_order() -> None:
    corpus = corpus_of(random_windows("a", count=5, vocabulary=50), random_windows("b", count=6, vocabulary=50))
    stream = endless(corpus, 4, seed=0, device=CPU)
    epochs = [[w for batch in itertools.islice(stream, 3) for w in batch.windows] for _ in range(3)]
    for epoch in epochs:
        assert sorted(map(id, epoch)) == sorted(map(id, corpus.windows))
    assert len({tuple(map(id, epoch)) for epoch in epochs}) == 3
    assert any(len({w.domain for w in epoch[:4]}) == 2 for epoch in epochs)  # domains are mixed


def test_the_order_is_the_seed_s() -> None:
    corpus = corpus_of(random_windows("a", count=20, vocabulary=50))

    def order(seed: int) -> list[int]:
        batches = itertools.islice(endless(corpus, 6, seed=seed, device=CPU), 8)
        return [id(window) for batch in batches for window in batch.windows]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_steps_need_the_text_that_they_read() -> None:
    """No less, at most a batch of the teacher's more, and less of the same for fewer of them."""
    windows = [
        *random_windows("a", count=900, vocabulary=50, longest=16),
        *random_windows("b", count=900, vocabulary=50),
    ]
    corpus, length = corpus_of(windows[:900], windows[900:]), 32
    together, before = rows_for(length), 0
    for steps in (1, 60, 100, 200):
        schedule = Schedule(steps=steps, tokens_per_step=128)  # four windows
        needed = schedule.needed(corpus, length)
        count = len(needed.windows)
        assert count % together == 0 and 4 * steps <= count < 4 * steps + together and count >= before
        assert replace(schedule, seed=7).needed(corpus, length).windows == needed.windows
        names = [id(window) for window in needed.windows]
        assert names == [id(window) for window in corpus.windows if id(window) in set(names)]  # in their order
        assert in_sampled_order(needed.windows) == in_sampled_order(corpus.windows)[:count]
        assert needed.tokens == {
            name: sum(len(window.tokens) for window in needed.windows if window.domain == name) for name in "ab"
        }
        assert min(needed.tokens.values()) > 0
        before = count
    assert Schedule(steps=450, tokens_per_step=128).needed(corpus, length) is corpus
    assert Schedule(steps=2, tokens_per_step=8).needed(corpus, length).windows  # a window at least


@pytest.mark.parametrize("steps", [1, 2, 19, 200, 1000])
def test_the_pace_rises_to_one_and_falls_to_a_tenth(steps: int) -> None:
    rates = [pace(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in rates)
    assert max(rates) == 1.0
    top = rates.index(1.0)
    assert top <= max(1, steps // 20)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if steps > 1:
        assert pace(steps, steps) == pytest.approx(0.1)


@pytest.mark.parametrize("norm", [0.0, 5e-9, NOISE, float("nan")])
def test_a_gradient_of_rounding_noise_is_refused(norm: float) -> None:
    with pytest.raises(UsageError, match="does not reach them; use --objective distill"):
        refuse_noise(norm)


def test_a_gradient_is_accepted() -> None:
    refuse_noise(2 * NOISE)


def test_the_order_goes_on_where_it_was() -> None:
    corpus = corpus_of(random_windows("a", count=7, vocabulary=50))

    def order(done: int, count: int) -> list[list[int]]:
        batches = itertools.islice(endless(corpus, 3, 4, CPU, done=done), count)
        return [[id(window) for window in batch.windows] for batch in batches]

    assert order(0, 8)[5:] == order(5, 3)


def test_the_warm_up_is_as_long_as_asked() -> None:
    assert [pace(step, 10, 0.4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert pace(0, 10, 0.0) == 1.0


def test_command_line_recipes_and_library_have_the_same_defaults() -> None:
    told = {name: given.default for name, given in inspect.signature(command).parameters.items()}
    schedule, losses, step, spec = Schedule(), Losses(), RecoverStep(), RecoverSpec(teacher="teacher")
    assert {name: told[name] for name in Schedule.__dataclass_fields__} == {
        name: getattr(schedule, name) for name in Schedule.__dataclass_fields__
    }
    renamed = {"router": "router_distill", "z": "z_loss"}
    assert {name: told[renamed.get(name, name)] for name in Losses.__dataclass_fields__} == {
        name: getattr(losses, name) for name in Losses.__dataclass_fields__
    }
    assert tuple(told["adapt"]) == step.adapt == spec.adapt
    assert told["max_tokens"] == step.max_tokens
    assert told["heldout_tokens"] == step.heldout_tokens == spec.heldout_tokens
