"""The order of the text, the pace of the learning, and what is reported of a run."""

from __future__ import annotations

import itertools

import pytest
import torch

from moesurgeon.errors import UsageError
from moesurgeon.recovery.train import NOISE, Recovered, _endless, _pace, _refuse_noise
from tests.engine.small import corpus_of, random_windows

CPU = torch.device("cpu")


def test_every_epoch_holds_every_window_once_in_another_order() -> None:
    corpus = corpus_of(random_windows("a", count=5, vocabulary=50), random_windows("b", count=6, vocabulary=50))
    stream = _endless(corpus, 4, seed=0, device=CPU)
    epochs = [[w for batch in itertools.islice(stream, 3) for w in batch.windows] for _ in range(3)]
    for epoch in epochs:
        assert sorted(map(id, epoch)) == sorted(map(id, corpus.windows))
    assert len({tuple(map(id, epoch)) for epoch in epochs}) == 3
    assert any(len({w.domain for w in epoch[:4]}) == 2 for epoch in epochs)  # domains are mixed


def test_the_order_is_the_seed_s() -> None:
    corpus = corpus_of(random_windows("a", count=20, vocabulary=50))

    def order(seed: int) -> list[int]:
        batches = itertools.islice(_endless(corpus, 6, seed=seed, device=CPU), 8)
        return [id(window) for batch in batches for window in batch.windows]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("steps", [1, 2, 19, 200, 1000])
def test_the_pace_rises_to_one_and_falls_to_a_tenth(steps: int) -> None:
    pace = [_pace(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in pace)
    assert max(pace) == 1.0
    top = pace.index(1.0)
    assert top <= max(1, steps // 20)
    assert pace[:top] == sorted(pace[:top])
    assert pace[top:] == sorted(pace[top:], reverse=True)
    if steps > 1:
        assert _pace(steps, steps) == pytest.approx(0.1)


@pytest.mark.parametrize("norm", [0.0, 5e-9, NOISE, float("nan")])
def test_a_gradient_of_rounding_noise_is_refused(norm: float) -> None:
    with pytest.raises(UsageError, match="does not reach them; use --objective distill"):
        _refuse_noise(norm)


def test_a_gradient_is_accepted() -> None:
    _refuse_noise(2 * NOISE)


def test_the_gap_is_that_to_the_teacher() -> None:
    def closed(before: float, after: float, teacher: float) -> float | None:
        return Recovered(None, before, after, teacher, 1.0).gap_closed

    assert closed(3.0, 2.5, 2.0) == pytest.approx(0.5)
    assert closed(3.0, 3.0, 2.0) == 0.0
    assert closed(3.0, 1.5, 2.0) == pytest.approx(1.5)  # better than the teacher
    assert closed(2.0, 1.9, 2.0) is None  # there was none
    assert closed(2.0, 1.9, 2.5) is None


def test_a_report_holds_no_tensors() -> None:
    report = Recovered({0: torch.zeros(2, 2)}, 3.0, 2.0, 1.0, 0.5, [{"step": 1}]).as_dict()
    assert report == {
        "loss_before": 3.0,
        "loss_after": 2.0,
        "teacher_loss": 1.0,
        "gradient_norm": 0.5,
        "log": [{"step": 1}],
        "gap_closed": 0.5,
    }
