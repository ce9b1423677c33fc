"""What layers are called with: as a fresh stock model would call them, whatever other batches there were."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from moesurgeon.engine import arguments
from moesurgeon.engine.scratch import Scratch
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import Subject, open_subject
from tests.engine.small import source_of, stream_of
from tests.families.factory import save_checkpoint
from tests.laws.walks import load_stock, logits_of, same, text, walked


def test_positions_that_grow_with_the_text_do_not_remember_it(tmp_path: Path) -> None:
    """Stock keeps the frequencies of the longest text so far; then a result would depend on the batches before."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = save_checkpoint(tmp_path / "model", "qwen3_moe", rope_parameters=rope, max_position_embeddings=16)
    lengths = (24, 40, 20, 10, 40, 30)
    batches = [text(length, seed=number) for number, length in enumerate(lengths)]
    expected = [logits_of(load_stock(folder), batch) for batch in batches]
    one_after_the_other = load_stock(folder)
    assert not same([logits_of(one_after_the_other, batch) for batch in batches], expected)
    subject = open_subject(str(folder))
    assert same(walked([stream_of(subject)], batches)[0], expected)
    assert same(walked([stream_of(subject)], batches[::-1])[0], expected[::-1])


def test_walks_one_after_the_other_do_not_mix_up_their_masks(tiny: Subject) -> None:
    """Batches come and go, and a new one can have the place in memory of one that is gone."""
    source = source_of(tiny)
    for seed in range(5):
        batches = [text(20 + seed % 3, 9 + seed, seed=seed), text(12, 30 - seed, seed=seed)]
        found = walked([Stream(source)], batches)[0]
        assert same(found, walked([stream_of(tiny)], batches)[0])
        del batches
        gc.collect()


@pytest.mark.parametrize(("shapes", "room"), [(1, 0), (1, 2000), (64, 0)])
def test_what_is_not_remembered_is_asked_for_again(
    shapes: int, room: int, tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [text(20, 9), text(20, 20), text(12, 30), text(8), text(9)]
    expected = walked([stream_of(tiny)], batches)[0]
    monkeypatch.setattr(arguments, "_REMEMBERED", shapes)
    stream = stream_of(tiny)
    stream.source.scratch = Scratch(masks=room)
    assert same(walked([stream], batches)[0], expected)


@pytest.mark.parametrize("fails", [False, True])
def test_the_layers_are_left_as_they_were(fails: bool, tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(tiny)
    base = stream.source.skeleton.base

    def broken(*_arguments: object, **_named: object) -> None:
        raise CheckpointError("not today")

    if fails:
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="not today"):
            patch.setattr(base.rotary_emb, "forward", broken)
            walked([stream], [text(9)])
    else:
        walked([stream], [text(9)])
    assert not any("forward" in vars(module) for module in base.modules())
