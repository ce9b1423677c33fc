"""Who fell below the floor, and whether that is sure."""

from __future__ import annotations

import numpy as np
import pytest

from moesurgeon.evaluation.measure import Measurement
from moesurgeon.recovery.floor import starves, use_of
from moesurgeon.recovery.judge import Judgement
from moesurgeon.surgery.anatomy import Anatomy
from tests.engine.small import saved, small_model


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    return saved(small_model("mixtral", num_hidden_layers=1), tmp_path_factory.mktemp("model") / "model").anatomy


def judged(counts: list[list[int]], documents: list[int] | None = None) -> Judgement:
    """Return what a judge saw whose windows chose so often each of 8 experts of one layer."""
    windows = np.array(counts, dtype=np.int64)[:, None]
    number = np.array(documents or range(len(windows)))
    measured = Measurement(("a",), np.zeros_like(number), number, np.ones((len(windows), 1, 6)), 1.0, 1, False)
    return Judgement(np.zeros(len(windows)), windows, measured, windows)


EVEN = [10] * 8


def with_last(count: int, even: int = 10) -> list[int]:
    return [even] * 7 + [count]


def test_an_expert_that_falls_everywhere_has_surely_fallen(anatomy: Anatomy) -> None:
    (layer,) = use_of(anatomy, judged([EVEN] * 12), judged([with_last(1)] * 12)).values()
    assert layer["fallen"] == layer["starved"] == [7] and layer["least"] == pytest.approx(8 / 71)


def test_who_was_below_before_or_is_above_has_not_fallen(anatomy: Anatomy) -> None:
    few, most = judged([with_last(1)] * 12), judged([with_last(3)] * 12)
    assert use_of(anatomy, few, few)["0"]["fallen"] == []
    assert use_of(anatomy, judged([EVEN] * 12), most)["0"]["fallen"] == []
    assert use_of(anatomy, judged([EVEN] * 12), most, 0.5)["0"]["starved"] == [7]
    assert use_of(anatomy, judged([EVEN] * 12), few, 0.0)["0"]["fallen"] == [7]  # told by the usual floor


def test_who_was_below_may_not_lose_half_of_that(anatomy: Anatomy) -> None:
    before = judged([with_last(2)] * 40)  # 0.22 of a fair share
    assert use_of(anatomy, before, judged([with_last(2, even=19)] * 40))["0"]["fallen"] == []
    (layer,) = use_of(anatomy, before, judged([with_last(2, even=40)] * 40)).values()
    assert layer["fallen"] == layer["starved"] == [7]
    never = judged([with_last(0)] * 40)
    assert use_of(anatomy, never, never)["0"]["fallen"] == []


def test_few_choices_prove_nothing(anatomy: Anatomy) -> None:
    """A quarter of an even share of 14 choices is less than half a choice: none at all is chance."""
    (layer,) = use_of(anatomy, judged([EVEN] * 2), judged([with_last(0, even=1)] * 2)).values()
    assert layer["fallen"] == [7] and layer["starved"] == [] and not starves({"0": layer})
    # Twelve times as much: e^-(0.25 x 84 / 8) = 7 %; twice that: 0.5 %.
    for windows, sure in ((12, False), (24, True)):
        found = use_of(anatomy, judged([EVEN] * 2), judged([with_last(0, even=1)] * windows))
        assert starves(found) == sure


def test_one_document_that_has_an_expert_is_not_all_text(anatomy: Anatomy) -> None:
    """Eleven documents have none of it, one has many: another text of twelve might have two or three of that kind."""
    counts = [with_last(0)] * 11 + [with_last(20)]
    (layer,) = use_of(anatomy, judged([EVEN] * 12), judged(counts)).values()
    assert layer["fallen"] == [7] and layer["starved"] == []
    # The same choices in windows of documents that are all alike.
    (layer,) = use_of(anatomy, judged([EVEN] * 12), judged([with_last(1)] * 12)).values()
    assert layer["starved"] == [7]


def test_windows_of_a_document_count_as_one(anatomy: Anatomy) -> None:
    counts = [with_last(0), with_last(0), with_last(0), with_last(6)] * 6
    documents = [number // 4 for number in range(24)]
    apart, together = (use_of(anatomy, judged([EVEN] * 12), judged(counts, of))["0"] for of in (None, documents))
    assert apart["fallen"] == together["fallen"] == [7]
    assert apart["starved"] == [] and together["starved"] == [7]


@pytest.mark.parametrize(("expert", "sure"), [(0, True), (7, False)])
def test_the_whole_interval_is_below(anatomy: Anatomy, expert: int, sure: bool) -> None:
    """Against 2000 resamples one by one."""
    random = np.random.default_rng(3)
    counts = random.poisson(10, (40, 8))
    counts[:, 0] = random.poisson(1.5, 40)
    counts[:, 7] = np.where(np.arange(40) == 0, 60, 0)
    shares = []
    for _ in range(2000):
        drawn = counts[random.integers(0, 40, 40)]
        shares.append(drawn[:, expert].sum() * 8 / drawn.sum())
    assert (np.quantile(shares, 0.975) < 0.25) == sure
    (layer,) = use_of(anatomy, judged([EVEN] * 40), judged(counts.tolist())).values()
    assert expert in layer["fallen"] and (expert in layer["starved"]) == sure


def test_one_document_tells_nothing_for_sure(anatomy: Anatomy) -> None:
    (layer,) = use_of(anatomy, judged([EVEN] * 12), judged([with_last(1)] * 12, [0] * 12)).values()
    assert layer["fallen"] == [7] and layer["starved"] == []
