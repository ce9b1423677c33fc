"""Hidden states in a file are those in memory, and what was kept is there again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesurgeon.engine.hidden import HiddenStates
from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.errors import OutputError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.engine.small import source_of
from tests.laws.walks import same, text, walked

SHAPES = [(2, 5, 4), (1, 3, 4), (3, 1, 4)]


def _states(number: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=random) for shape in SHAPES]


def test_a_walk_over_files_is_a_walk_in_memory(tiny: Subject, tmp_path: Path) -> None:
    batches = [text(24, 17), text(20, 20), text(8)]
    source = source_of(tiny)
    streams = [Stream(source), Stream(source, Overlay(plan=plan_retop(tiny.anatomy, RetopSpec(top_k=1))))]
    expected = walked(streams, batches)
    found = walked(streams, batches, tmp_path)
    assert all(same(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    tokens = sum(batch.tokens.numel() for batch in batches)
    assert [path.stat().st_size for path in sorted(tmp_path.iterdir())] == [tokens * tiny.anatomy.hidden * 4] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_file", [False, True])
def test_what_is_put_is_what_one_gets(dtype: torch.dtype, in_file: bool, tmp_path: Path) -> None:
    hidden = HiddenStates(SHAPES, dtype, tmp_path / "states" if in_file else None)
    for layer in range(-1, 3):
        states = [one.to(dtype) for one in _states(layer + 1)]
        for batch in (2, 0, 1):
            hidden.put(batch, states[batch], layer=layer)
        hidden.turn_to(layer + 1)
        for batch in range(3):
            assert torch.equal(hidden.get(batch), states[batch])


def test_of_kept_states_those_before_and_after_a_layer_are_there(tmp_path: Path) -> None:
    """Also for another process, which opens the files again."""
    hidden = HiddenStates(SHAPES, torch.float32, tmp_path / "states", keep=True)
    for layer in range(-1, 4):
        for batch, states in enumerate(_states(layer + 1)):
            hidden.put(batch, states, layer=layer)
        if layer < 0:
            continue
        for one in (hidden, HiddenStates(SHAPES, torch.float32, tmp_path / "states", keep=True)):
            for done in (layer, layer + 1):
                one.turn_to(done)
                assert all(torch.equal(one.get(batch), states) for batch, states in enumerate(_states(done)))


@pytest.mark.parametrize("in_file", [False, True])
def test_there_may_be_no_batch_at_all(in_file: bool, tiny: Subject, tmp_path: Path) -> None:
    """A process of many can have nothing to do."""
    assert walked([Stream(source_of(tiny))], [], tmp_path if in_file else None) == [[]]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be held in .*nowhere.*; choose another disk") as raised:
        HiddenStates(SHAPES, torch.float32, tmp_path / "nowhere" / "states")
    assert "\n" not in str(raised.value)
