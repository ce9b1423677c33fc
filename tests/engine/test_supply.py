"""Weights layer by layer: two slots and no more, the next layer read meanwhile, and a reader that never hangs."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesurgeon.engine.skeleton import Target
from moesurgeon.engine.supply import Supply, Tensors, plan_memory
from moesurgeon.errors import CheckpointError

CPU = torch.device("cpu")
SECONDS = 60  # until a test that waits gives up: a bound, not a measurement


@dataclass(frozen=True)
class Bones:
    """A model of nothing but names: an embedding, layers of these sizes, a head."""

    sizes: tuple[int, ...] = (8, 8, 16, 8, 8)

    @property
    def layers(self) -> int:
        return len(self.sizes)

    @property
    def targets(self) -> dict[str, Target]:
        layers = {f"layer.{n}": Target((size, 16), torch.float32) for n, size in enumerate(self.sizes)}
        return {"embedding": Target((4, 16), torch.float32), **layers, "head": Target((8, 16), torch.float32)}

    def names_of_layer(self, number: int) -> list[str]:
        return [f"layer.{number}"]

    def names_of_embedding(self) -> list[str]:
        return ["embedding"]

    def names_of_tail(self) -> list[str]:
        return ["head"]


GROUPS = len(Bones().sizes) + 2


class Reader:
    """Fills every group with its number and keeps count; ``allocated`` are the bytes that live at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int | None = None) -> None:
        self.reads: list[int] = []
        self.living = 0
        self.most = 0
        bones: Any = Bones()
        self.number = {name: group for group, name in enumerate(bones.targets)}
        self.supply = Supply(bones, self.fill, CPU)
        allocate = self.supply._memory

        def counted(size: int, device: torch.device) -> torch.Tensor:
            memory = allocate(size, device)
            storage: Any = memory.untyped_storage()
            self.living += size
            self.most = max(self.most, self.living)
            weakref.finalize(storage, lambda: setattr(self, "living", self.living - size))
            return memory

        monkeypatch.setattr(self.supply, "_memory", counted)
        self.supply.allow(self.supply.least if limit is None else limit)

    def fill(self, tensors: Tensors, _enough: threading.Event) -> None:
        for name, tensor in tensors.items():
            tensor.fill_(self.number[name])
        self.reads += [self.number[name] for name in tensors]


def _walk(supply: Supply, start: int = 0, stop: int | None = None) -> Iterator[int]:
    for group, tensors in supply.walk(start, stop):
        assert all((tensor == group).all() for tensor in tensors.values()), group
        yield group


def _reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("moesurgeon-read")]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 400), st.sampled_from([1, 2]))
def test_memory_is_planned_within_the_limit(sizes: list[int], limit: int, slots: int) -> None:
    least = min(slots * max(sizes), sum(sizes))
    limit = max(limit, least)
    plan = plan_memory(sizes, limit, slots)
    assert plan.nbytes <= limit
    assert plan.nbytes == sum(sizes[group] for group in plan.kept) + slots * plan.slot
    assert plan.is_resident == (sum(sizes) <= limit or plan.slot == 0)
    passing = [size for group, size in enumerate(sizes) if group not in plan.kept]
    assert max(passing, default=0) <= plan.slot
    if not plan.is_resident:  # no room is left for any of those that pass
        assert min(passing) > limit - plan.nbytes


@settings(deadline=None, max_examples=40)
@given(st.integers(0, GROUPS - 1), st.integers(0, 3000), st.integers(1, 3))
def test_every_walk_yields_every_group_with_its_weights(start: int, more: int, times: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        reader = Reader(patch)
        reader.supply.allow(reader.supply.least + more)
        for _ in range(times):
            assert list(_walk(reader.supply, start)) == list(range(start, GROUPS))
        for group in range(start, GROUPS):
            assert reader.reads.count(group) == (1 if group in reader.supply.plan.kept else times)
    assert not _reading()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, GROUPS - 1), st.integers(1, GROUPS), st.integers(0, 3000))
def test_a_walk_goes_backwards_as_well(start: int, stop: int, more: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        reader = Reader(patch)
        reader.supply.allow(reader.supply.least + more)
        seen = []
        for group, tensors in reader.supply.walk(start, stop, backwards=True):
            assert all((tensor == group).all() for tensor in tensors.values()), group
            seen.append(group)
        assert seen == list(range(start, stop))[::-1]
        assert reader.most <= reader.supply.least + more
        assert list(_walk(reader.supply)) == list(range(GROUPS))
    assert not _reading()


def test_two_slots_are_all_the_memory_that_streaming_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(monkeypatch)
    for _ in range(3):
        assert list(_walk(reader.supply)) == list(range(GROUPS))
    assert reader.most == 2 * reader.supply.plan.slot == reader.supply.least


@pytest.mark.parametrize("more", [0, 100, 600])
def test_with_one_slot_a_layer_is_read_when_the_one_before_is_done(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(monkeypatch)
    limit = reader.supply.at_least(ahead=False) + more
    reader.supply.allow(limit, ahead=False)
    assert limit < reader.supply.least + more and reader.supply.plan.slots == 1
    for _ in range(2):
        for group in _walk(reader.supply):
            # Where the one at work is kept, the slot is free for the one behind it.
            kept = reader.supply.plan.kept
            assert max(reader.reads) <= max(group + (group in kept), *kept, 0)
        reader.reads.clear()
        reader.reads.append(0)
    assert [group for group in _walk(reader.supply, 1, 4)] == [1, 2, 3]
    gc.collect()
    assert reader.most <= reader.supply.plan.nbytes <= limit
    assert not _reading()


@pytest.mark.parametrize("more", [0, 600, 2000, 100_000])
def test_more_memory_is_used_for_what_stays_and_never_exceeded(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(monkeypatch)
    limit = reader.supply.least + more
    reader.supply.allow(limit)
    for _ in range(2):
        assert list(_walk(reader.supply)) == list(range(GROUPS))
    gc.collect()
    assert reader.most <= reader.supply.plan.nbytes <= limit
    reader.supply.allow(reader.supply.least)  # what no longer fits is let go of
    assert list(_walk(reader.supply)) == list(range(GROUPS))
    gc.collect()
    assert reader.living <= reader.supply.least


def test_the_next_layer_is_read_while_one_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(monkeypatch)
    read = [threading.Event() for _ in range(GROUPS)]
    fill = reader.supply._fill

    def telling(tensors: Tensors, enough: threading.Event) -> None:
        fill(tensors, enough)
        read[reader.number[next(iter(tensors))]].set()

    monkeypatch.setattr(reader.supply, "_fill", telling)
    for group in _walk(reader.supply):
        if group + 1 < GROUPS:
            assert read[group + 1].wait(SECONDS), f"{group + 1} is not read while {group} is in use"
        if group + 2 < GROUPS:
            assert not read[group + 2].is_set(), f"{group + 2} is in a slot that {group} has"


def test_nothing_beyond_the_end_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(monkeypatch)
    assert list(_walk(reader.supply, 1, 4)) == [1, 2, 3]
    assert sorted(reader.reads) == [1, 2, 3]


@pytest.mark.parametrize("broken", range(GROUPS))
def test_an_error_of_the_reader_is_the_walker_s(broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was raised, at the layer that could not be read, and with the thread gone."""
    reader = Reader(monkeypatch)
    fill, error = reader.supply._fill, CheckpointError("the disk is gone; get it back")

    def failing(tensors: Tensors, enough: threading.Event) -> None:
        if broken in (reader.number[name] for name in tensors):
            raise error
        fill(tensors, enough)

    monkeypatch.setattr(reader.supply, "_fill", failing)
    seen = []
    with pytest.raises(CheckpointError) as raised:
        for group in _walk(reader.supply):
            seen.append(group)
    assert raised.value is error
    assert seen == list(range(broken))
    assert not _reading()
    monkeypatch.setattr(reader.supply, "_fill", fill)
    assert list(_walk(reader.supply)) == list(range(GROUPS))  # and another walk finds all in order


@pytest.mark.parametrize("left_at", range(GROUPS - 1))
def test_leaving_early_stops_the_reader(left_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one in the middle of a layer: it is told, and waited for."""
    reader = Reader(monkeypatch)
    fill, started = reader.supply._fill, threading.Event()
    told = []

    def patient(tensors: Tensors, enough: threading.Event) -> None:
        if reader.number[next(iter(tensors))] == left_at + 1:
            started.set()
            told.append(enough.wait(SECONDS))
        else:
            fill(tensors, enough)

    monkeypatch.setattr(reader.supply, "_fill", patient)
    groups = _walk(reader.supply)
    for group in groups:
        if group == left_at:
            break
    assert started.wait(SECONDS)
    groups.close()  # type: ignore[attr-defined]
    assert told == [True]
    assert not _reading()
    assert left_at + 2 not in reader.reads


def test_what_was_read_in_part_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for everything a walk that is left early must not leave half a layer for the next one."""
    reader = Reader(monkeypatch, 100_000)
    assert reader.supply.plan.is_resident
    fill, started = reader.supply._fill, threading.Event()

    def interrupted(tensors: Tensors, enough: threading.Event) -> None:
        if reader.number[next(iter(tensors))] == 3:
            started.set()
            enough.wait(SECONDS)  # and leaves without having filled it
        else:
            fill(tensors, enough)

    monkeypatch.setattr(reader.supply, "_fill", interrupted)
    groups = _walk(reader.supply)
    assert next(groups) == 0
    assert started.wait(SECONDS)
    groups.close()  # type: ignore[attr-defined]
    monkeypatch.setattr(reader.supply, "_fill", fill)
    assert list(_walk(reader.supply)) == list(range(GROUPS))
