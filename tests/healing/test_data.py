"""What a block should have given: the target closes the whole distance to the teacher, drift included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesurgeon.errors import CheckpointError, OutputError
from moesurgeon.healing.data import block_data, importance_of
from moesurgeon.healing.room import Room
from moesurgeon.pipeline.subject import open_subject
from tests.families.conftest import Stock
from tests.families.factory import save_checkpoint
from tests.healing.cases import HELD, LEARN, Stop, cut, stopped


def _arrives(stop: Stop) -> None:
    """A block that gives the target takes the student to where the teacher is."""
    position = 0
    for number, batch in enumerate(LEARN):
        mine = batch.is_text
        count = int(mine.sum())
        target = torch.zeros(mine.numel(), stop.train.target.shape[1])
        target[mine.flatten()] = stop.train.target[position : position + count]
        position += count
        own = stop.block.module.forward
        stop.block.module.forward = lambda states, *_more, target=target, **_named: target.view(states.shape)
        try:
            found = stop.layer.forward(stop.student, number)
        finally:
            stop.block.module.forward = own
        wanted = stop.layer.walk.hidden[stop.teacher].get(number)
        torch.testing.assert_close(found[mine], wanted[mine], rtol=1e-4, atol=1e-4)
    assert position == len(stop.train)


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "deepseek_v3", "qwen2_moe", "jamba", "lfm2_moe"])
def test_the_target_takes_a_block_to_its_teacher(name: str, stock: Stock) -> None:
    """In the second mixture layer: what the first one lost is to be made good as well."""
    subject = open_subject(str(stock(name)))
    with stopped(subject, cut(subject), which=1) as stop:
        own = [stop.layer.states(stream, 0) for stream in (stop.student, stop.teacher)]
        assert not torch.allclose(own[0], own[1])
        _arrives(stop)


def test_a_residual_multiplier_is_divided_out(tmp_path: Path) -> None:
    subject = open_subject(str(save_checkpoint(tmp_path / "granite", "granitemoe", residual_multiplier=0.3)))
    with stopped(subject, cut(subject), which=1) as stop:
        _arrives(stop)


def test_a_token_counts_by_the_size_of_its_state(stock: Stock) -> None:
    """1 / |h|^2 of the teacher's state after the layer; a state near zero does not count for everything."""
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject), which=1) as stop:
        states = [stop.layer.walk.hidden[stop.teacher].get(number)[batch.is_text] for number, batch in enumerate(LEARN)]
        expected = 1 / torch.cat(states).double().square().sum(-1)
        torch.testing.assert_close(stop.train.importance.double(), expected / expected.mean(), rtol=1e-4, atol=0)
    found = importance_of(torch.tensor([0.0, 1.0, 1.0, 98.0]))
    assert found.mean() == pytest.approx(1) and found[0] / found[1] == pytest.approx(400)
    assert torch.isfinite(importance_of(torch.zeros(3))).all()


def test_padding_is_no_data(stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        assert len(stop.train) == sum(batch.text_tokens for batch in LEARN)
        assert len(stop.heldout) == sum(batch.text_tokens for batch in HELD)
        assert stop.train.indices.shape == (len(stop.train), 2)
        assert [rows for rows, *_ in stop.train.chunks(torch.device("cpu"), 300)][:2] == [
            slice(0, 300),
            slice(300, 600),
        ]


def test_in_files_as_in_memory(stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        mapped = block_data(stop.layer, stop.student, stop.teacher, range(len(LEARN)), Room(tmp_path), "train")
        assert torch.equal(mapped.inputs, stop.train.inputs) and torch.equal(mapped.target, stop.train.target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.inputs", "train.target"]


def test_a_block_that_computes_otherwise_is_refused(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        kind = type(stop.block.experts)
        own = kind.forward
        monkeypatch.setattr(kind, "forward", lambda *given: own(*given) * 1.01)
        with pytest.raises(OutputError, match="please report it"):
            block_data(stop.layer, stop.student, stop.teacher, [0], Room(), "train")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float, stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        stop.layer.walk.hidden[stop.teacher].get(1)[0, 0, 0] = value
        with pytest.raises(CheckpointError, match="layer 0: hidden states are not finite"):
            block_data(stop.layer, stop.student, stop.teacher, range(len(LEARN)), Room(), "train")
