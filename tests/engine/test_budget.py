"""How memory is shared out: what gives way first, and that a decision stays within its limit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from moesurgeon.engine import budget
from moesurgeon.engine.batches import Batch
from moesurgeon.engine.budget import INTERPRETER, Demand, share_out, taken_bytes
from moesurgeon.engine.memory_use import MemoryUse
from moesurgeon.engine.scratch import BATCH_TOKENS, LOGIT_POSITIONS
from moesurgeon.engine.streams import Source
from moesurgeon.engine.working import COMPARED, layer_bytes, logit_bytes
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.subject import Subject, open_subject
from tests.engine.small import saved, small_model, source_of
from tests.laws.walks import text

LENGTH = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Layers of 0.6 MB, which are more than a batch of 128 tokens needs."""
    model = small_model("mixtral", num_hidden_layers=4, hidden_size=64, intermediate_size=96)
    return saved(model, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def source(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(budget, "taken_bytes", lambda *_given: 0)
    return source_of(subject)


@cache
def _batched(tokens: int, total: int = 16384) -> Sequence[Batch]:
    each = max(1, tokens // LENGTH)
    return [text(*[LENGTH] * each, seed=number) for number in range(max(1, total // (each * LENGTH)))]


def _demand(tokens: int) -> Demand:
    return Demand(batches=_batched(tokens), logits=COMPARED)


def _share(source: Source, limit: int, **options: object) -> MemoryUse:
    return share_out(limit, [source], _demand, **options)  # type: ignore[arg-type]


def _least(source: Source) -> int:
    """Return the least limit that is not refused."""
    low, high = 0, 1 << 40
    while low < high:
        middle = (low + high) // 2
        try:
            _share(source, middle)
            high = middle
        except UsageError:
            low = middle + 1
    return low


def test_with_enough_nothing_is_made_smaller(source: Source) -> None:
    used = _share(source, 1 << 40)
    assert (used.batch_tokens, used.scratch.tokens) == (BATCH_TOKENS, BATCH_TOKENS)
    assert used.scratch.positions == LOGIT_POSITIONS and used.note is None
    assert used.resident and used.read_ahead and not used.hidden_in_files and not used.shrunk


def test_what_gives_way_comes_in_order(source: Source) -> None:
    """Weights, hidden states, logits and batches, reading ahead, then batches again."""
    most, least = _share(source, 1 << 40).estimate, _least(source)
    limit, seen = most, []
    while limit >= least:
        used = _share(source, limit)
        assert used.estimate <= limit and source.scratch == used.scratch
        assert source.supply.plan.slots == (1 + used.read_ahead)
        seen.append(used)
        limit -= max(1, most // 150)
    seen.append(_share(source, least))
    assert seen[0].resident and not seen[-1].resident
    ahead = [used.read_ahead for used in seen]
    assert ahead == sorted(ahead, reverse=True) and not ahead[-1]
    for some in (True, False):
        tokens = [used.batch_tokens for used in seen if used.read_ahead is some]
        assert tokens == sorted(tokens, reverse=True)
    assert min(used.batch_tokens for used in seen if used.read_ahead) == 1024
    assert seen[-1].batch_tokens == 128 and seen[-1].scratch.positions == 64
    assert all(used.shrunk and used.note for used in seen if used.batch_tokens < BATCH_TOKENS)


def test_a_long_window_is_the_smallest_batch(source: Source) -> None:
    window = text(4000)
    used = share_out(1 << 40, [source], lambda _tokens: Demand(batches=[window]))
    assert used.batch_tokens == 4000
    least = layer_bytes(source, [window]) + source.supply.at_least(ahead=False)
    with pytest.raises(UsageError, match=r"this needs .*: give at least [\d.]+MB, shorten --length"):
        share_out(least // 2, [source], lambda _tokens: Demand(batches=[window]))


def test_all_weights_in_memory_come_before_large_batches(source: Source) -> None:
    """Where something can only be done so."""
    limit = source.supply.all_bytes + layer_bytes(source, _batched(256)) + logit_bytes(source, 256, COMPARED)
    assert not _share(source, limit).resident
    used = _share(source, limit, whole="this")
    assert used.resident and used.batch_tokens <= 256
    with pytest.raises(UsageError, match="this needs the checkpoint in memory, that is"):
        _share(source, source.supply.all_bytes - 1, whole="this")


def test_processes_have_the_same_batches(source: Source) -> None:
    assert _share(source, 1 << 40, agreed=lambda tokens: min(tokens, 2048)).batch_tokens == 2048
    assert _share(source, 1 << 40, agreed=lambda tokens: tokens).batch_tokens == BATCH_TOKENS


def test_masks_are_kept_only_where_weights_do_not_need_the_room(source: Source) -> None:
    padded = [text(LENGTH, 20, seed=number) for number in range(50)]

    def demand(_tokens: int) -> Demand:
        return Demand(batches=padded)

    used = share_out(1 << 40, [source], demand)
    assert source.scratch.masks == 50 * 4 * 2 * LENGTH**2
    assert share_out(used.estimate - 1, [source], demand).resident
    assert 0 < source.scratch.masks < 50 * 4 * 2 * LENGTH**2


def test_the_interpreter_counts_as_one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same limit gives the same batches; only a process that has more counts as it is."""
    for used in (1, INTERPRETER // 2):
        monkeypatch.setattr(budget.free, "used_bytes", lambda used=used: used)
        assert taken_bytes(1, CPU) == INTERPRETER
    monkeypatch.setattr(budget.free, "used_bytes", lambda: 3 * INTERPRETER)
    assert 3 * INTERPRETER < taken_bytes(1, CPU) < 4 * INTERPRETER
    assert taken_bytes(None, CPU) == 0


def test_a_stream_knows_what_it_copies(subject: Subject, tmp_path: Path) -> None:
    from moesurgeon.engine.streams import Overlay, Stream
    from moesurgeon.surgery.prune import plan_prune
    from moesurgeon.surgery.retop import RetopSpec, plan_retop

    opened, anatomy = source_of(open_subject(subject.name)), subject.anatomy
    assert Stream(opened, Overlay(plan=plan_retop(anatomy, RetopSpec(top_k=1)))).copied_bytes == 0
    kept = plan_prune(anatomy, dict.fromkeys(anatomy.moe_layers, range(6)))
    assert Stream(opened, Overlay(plan=kept)).copied_bytes == 4 * (6 * 3 * 64 * 96 + 6 * 64)
