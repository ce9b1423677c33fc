"""The weights of one checkpoint, a layer at a time, the next one read while this one computes.

Two slots of memory, each as large as the largest layer, take turns; layers for which there is room beyond
those stay where they are from the first walk on. With room for all of them the model is resident, and
nothing is ever read twice. Where there is no room for two there is one slot, and a layer is read once the one
before is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from moesurgeon.engine.skeleton import Skeleton, Target

Tensors = Mapping[str, torch.Tensor]
Fill = Callable[[Tensors, threading.Event], None]
_ALIGNED = 64  # bytes; cache lines, and more than any dtype needs


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """``kept``: the groups that stay in memory; the others take turns in ``slots`` of ``slot`` bytes each."""

    kept: frozenset[int]
    slot: int
    nbytes: int
    slots: int = 2

    @property
    def is_resident(self) -> bool:
        return self.slot == 0


def groups_of(skeleton: Skeleton) -> list[list[str]]:
    """Return the names of what is needed together, in the order of a walk: embedding, each layer, tail."""
    layers = [skeleton.names_of_layer(number) for number in range(skeleton.layers)]
    return [skeleton.names_of_embedding(), *layers, skeleton.names_of_tail()]


def plan_memory(sizes: Sequence[int], limit: int, slots: int = 2) -> MemoryPlan:
    """Decide which groups of these ``sizes`` in bytes to keep within ``limit``, the first ones first.

    >>> plan_memory([1, 4, 4, 4], 13).is_resident
    True
    >>> plan_memory([1, 4, 4, 4], 12)
    MemoryPlan(kept=frozenset({0}), slot=4, nbytes=9, slots=2)
    """
    if sum(sizes) <= limit:
        return MemoryPlan(frozenset(range(len(sizes))), 0, sum(sizes))
    slot = max(sizes)
    room = limit - slots * slot
    kept: set[int] = set()
    for group, size in enumerate(sizes):
        if size <= room:
            kept.add(group)
            room -= size
    return MemoryPlan(frozenset(kept), slot, limit - room, slots)


class Supply:
    """Yields the groups of ``skeleton`` filled by ``fill``, as often as it is iterated over."""

    def __init__(self, skeleton: Skeleton, fill: Fill, device: torch.device) -> None:
        self._targets = skeleton.targets
        self._groups = groups_of(skeleton)
        self._sizes = [_size(self._targets[name] for name in names) for names in self._groups]
        self._fill = fill
        self.devices = [device] * len(self._groups)
        self.plan = plan_memory(self._sizes, sum(self._sizes))
        self._kept: dict[int, Tensors] = {}
        self._slots: list[torch.Tensor] = []

    @property
    def least(self) -> int:
        """The bytes without which nothing is read ahead: two of the largest groups, or all of them."""
        return self.at_least(ahead=True)

    @property
    def all_bytes(self) -> int:
        """The bytes of all groups together."""
        return sum(self._sizes)

    def at_least(self, *, ahead: bool) -> int:
        """Return the bytes without which there is no walk; ``ahead``: one that reads a group ahead."""
        return min((1 + ahead) * max(self._sizes), sum(self._sizes))

    def allow(self, limit: int, *, ahead: bool = True) -> None:
        """Keep within ``limit`` bytes from the next walk on; ``ahead``: read the next group while one is in use."""
        assert limit >= self.at_least(ahead=ahead)
        self.plan = plan_memory(self._sizes, limit, 1 + ahead)
        self._kept = {group: tensors for group, tensors in self._kept.items() if group in self.plan.kept}
        self._slots = []

    def spread(self, devices: Sequence[torch.device]) -> None:
        """Keep all groups, each on its device."""
        assert len(devices) == len(self._groups)
        self.devices = list(devices)
        self.allow(sum(self._sizes))

    def walk(
        self, start: int = 0, stop: int | None = None, *, backwards: bool = False
    ) -> Generator[tuple[int, Tensors]]:
        """Yield (group, tensors by name) of groups ``start`` to ``stop`` (all); the tensors hold until the next one.

        ``backwards``: the last one first.
        """
        groups = range(start, len(self._groups) if stop is None else stop)
        groups = groups[::-1] if backwards else groups
        passing = [group for group in groups if group not in self.plan.kept]
        if passing and not self._slots:
            self._slots = [self._memory(self.plan.slot, self.devices[0]) for _ in range(self.plan.slots)]
        slot_of = {group: self._slots[number % len(self._slots)] for number, group in enumerate(passing)}
        enough = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="moesurgeon-read") as pool:
            reads: dict[int, Future[Tensors]] = {}
            order = iter(group for group in groups if group not in self._kept)

            def read_ahead(free: int) -> None:
                """Begin to read until the next ``free`` of those that pass through a slot are under way."""
                while free > 0 and (group := next(order, None)) is not None:
                    reads[group] = pool.submit(self._read, group, slot_of.get(group), enough)
                    free -= group in slot_of

            try:
                read_ahead(self.plan.slots)
                for group in groups:
                    tensors = self._kept[group] if group in self._kept else reads.pop(group).result()
                    if group in self.plan.kept:
                        self._kept[group] = tensors
                    yield group, tensors
                    if group in slot_of and self.devices[group].type != "cpu":
                        torch.accelerator.synchronize(self.devices[group])  # the slot may still be computed with
                    if group in slot_of:
                        read_ahead(1)
            finally:
                enough.set()
                for read in reads.values():
                    read.cancel()

    def _read(self, group: int, slot: torch.Tensor | None, stop: threading.Event) -> Tensors:
        targets = {name: self._targets[name] for name in self._groups[group]}
        memory = slot if slot is not None else self._memory(_size(targets.values()), self.devices[group])
        tensors = _carved(memory, targets)
        self._fill(tensors, stop)
        return tensors

    def _memory(self, size: int, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)


def _carved(memory: torch.Tensor, targets: Mapping[str, Target]) -> Tensors:
    """Lay ``targets`` out in ``memory``, one after the other."""
    tensors, position = {}, 0
    for name, target in targets.items():
        part = memory[position : position + target.nbytes].view(target.dtype).view(target.shape)
        tensors[name] = part.data  # to autograd a tensor of its own: training one does not invalidate the others
        position += _padded(target.nbytes)
    return tensors


def _size(targets: Iterable[Target]) -> int:
    return sum(_padded(target.nbytes) for target in targets)


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
