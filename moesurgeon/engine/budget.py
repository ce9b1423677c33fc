"""How memory is shared out between weights, hidden states and what computing takes; what is made smaller if it is
little.

One place decides for every command that runs the model, from shapes alone and before anything is read. In this order,
until all fits: batches of 8192 tokens with hidden states in memory, then in files, fewer logits at once, batches of
half as many tokens down to 1024, the same with one layer at a time instead of two (nothing is read ahead), smaller
batches down to one window. Whatever is left over keeps layers in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from moesurgeon import launched
from moesurgeon.engine import free
from moesurgeon.engine.batches import Batch
from moesurgeon.engine.memory_use import MemoryUse, enough, said
from moesurgeon.engine.scratch import BATCH_TOKENS, LOGIT_POSITIONS, MASK_BYTES, Scratch
from moesurgeon.engine.streams import Source
from moesurgeon.engine.working import NO_LOGITS, layer_bytes, loading_bytes, logit_bytes
from moesurgeon.errors import UsageError

INTERPRETER = 512 << 20
"""Bytes that count as taken before anything is done, if the process does not have more: Python, torch, transformers
and what they load on the way. A fixed figure, so that the same budget gives the same batches."""
# Of the free memory, where the user names no limit: the rest is for the page cache and for others.
_SHARE = 0.8
_LOADED_LATER = 64 << 20  # libraries that are loaded once work begins, where the process has more than INTERPRETER
_FEW = 1024  # tokens: reading ahead is given up before batches get smaller than this
_LEAST_TOKENS, _LEAST_POSITIONS = 128, 64
_SPARE = 1.1  # of what is computed with: allocators keep pieces


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The memory that a command needs, with batches of a given number of tokens.

    ``batches`` walk with ``streams`` of each source at once. ``logits``: bytes of each (``engine.working``).
    ``copies``: bytes of a layer that streams have of their own, for as long as it is there. ``work``: bytes that are
    needed at another time than a batch's; ``always``: at all times. ``held``: bytes that go where hidden states go.
    """

    batches: Sequence[Batch]
    streams: int = 1
    logits: int = NO_LOGITS
    copies: int = 0
    work: int = 0
    always: int = 0
    held: int = 0


Demands = Callable[[int], Demand]
"""By the tokens of a batch; the first that is asked for has the largest ones."""


@dataclass(frozen=True, slots=True)
class _Way:
    """One of the ways to use memory, and the bytes that it takes: ``least`` for weights, ``rest`` for all else."""

    scratch: Scratch
    read_ahead: bool
    in_files: bool
    least: int
    rest: int

    @property
    def needs(self) -> int:
        return self.least + self.rest


def share_out(
    limit: int | None,
    sources: Sequence[Source],
    demands: Demands,
    *,
    whole: str | None = None,
    agreed: Callable[[int], int] | None = None,
) -> MemoryUse:
    """Divide ``limit`` bytes (None: most of what is free) of the device's memory; return how they are used.

    Every source is told what its weights may take, the first one first, and how much may be computed at once
    (``Source.scratch``). On a CPU the limit is that of the whole process, so what it uses already is taken off.
    ``whole``: who needs all weights in memory. ``agreed``: makes the tokens of a batch those that all processes have.
    Raises UsageError if the least does not fit; the message says how much would do.
    """
    for source in sources:
        if not source.placement.spread:  # what is held from before would count as used
            source.supply.allow(source.supply.at_least(ahead=False), ahead=False)
    if sources[0].placement.spread:
        return _spread(limit, sources, demands)
    device = sources[0].placement.device
    taken = taken_bytes(limit, device)
    left = _may_take(limit, device) - taken
    whole_weights = whole is not None
    most = BATCH_TOKENS
    found = least = None
    while found is None:
        for way in _ways(sources, demands, most, whole=whole_weights):
            least = way.needs if least is None else min(least, way.needs)
            if way.needs <= left:
                found = way
                break
        else:
            assert least is not None
            raise UsageError(_refusal(limit, device, least, left, taken, whole))
        if agreed is not None and most == BATCH_TOKENS and (tokens := agreed(found.scratch.tokens)) < most:
            most, found, agreed = tokens, None, None
    return _used(limit, sources, demands, found, left)


def _used(limit: int | None, sources: Sequence[Source], demands: Demands, way: _Way, left: int) -> MemoryUse:
    """Give every source its share; weights come before masks that can be made again."""
    demand, room = demands(way.scratch.tokens), left - way.rest
    weights = sum(source.supply.all_bytes for source in sources)
    masks = min(MASK_BYTES, _mask_bytes(demand.batches) * demand.streams, max(0, room - weights))
    scratch = replace(way.scratch, masks=masks)
    room -= masks
    for number, source in enumerate(sources):
        others = sum(other.supply.at_least(ahead=way.read_ahead) for other in sources[number + 1 :])
        source.supply.allow(room - others, ahead=way.read_ahead)
        source.scratch = scratch
        room -= source.supply.plan.nbytes
    largest = max((batch.tokens.numel() for batch in demand.batches), default=0)
    before = max((batch.tokens.numel() for batch in demands(BATCH_TOKENS).batches), default=0)
    resident = all(source.supply.plan.is_resident for source in sources)
    fewer = largest < before or scratch.positions < LOGIT_POSITIONS
    return MemoryUse(
        limit=limit,
        estimate=way.rest + masks + sum(source.supply.plan.nbytes for source in sources),
        scratch=scratch,
        batch_tokens=largest,
        read_ahead=way.read_ahead or resident,
        resident=resident,
        hidden_in_files=way.in_files,
        shrunk=fewer or not (way.read_ahead or resident),
    )


def _ways(sources: Sequence[Source], demands: Demands, most: int, *, whole: bool) -> Iterator[_Way]:
    """Yield the ways to use memory, the best one first."""
    longest = max((batch.tokens.shape[1] for batch in demands(most).batches), default=0)
    floor = max(longest, _LEAST_TOKENS)
    sizes = [most]
    while sizes[-1] // 2 > floor:
        sizes.append(sizes[-1] // 2)
    if sizes[-1] > floor:
        sizes.append(floor)
    enough = [size for size in sizes if size >= _FEW] or sizes[:1]
    for ahead, some in ((True, sizes if whole else enough), (False, () if whole else sizes)):
        for tokens in some:
            demand = demands(tokens)
            least = sum(each.supply.all_bytes if whole else each.supply.at_least(ahead=ahead) for each in sources)
            rest = _Rest(sources, demand)
            for in_files in (False, True):
                for scratch in _scratches(demand, tokens):
                    yield _Way(scratch, ahead, in_files, least, rest(scratch, in_files=in_files))


def _scratches(demand: Demand, tokens: int) -> Iterator[Scratch]:
    """Yield what may be computed at once with batches of ``tokens``: logits by halves, as far as that helps."""
    positions = LOGIT_POSITIONS
    yield Scratch(tokens, positions, 0)
    while demand.logits and positions // 2 >= max(_LEAST_POSITIONS, tokens // 32):
        positions //= 2
        yield Scratch(tokens, positions, 0)


class _Rest:
    """What is needed beside weights, as a function of what is computed at once."""

    def __init__(self, sources: Sequence[Source], demand: Demand) -> None:
        self._sources, self._demand = sources, demand
        self._layer = max(layer_bytes(source, demand.batches) for source in sources)
        self._rows = max((len(batch.tokens) for batch in demand.batches), default=1)
        tokens = sum(batch.tokens.numel() for batch in demand.batches)
        states = sum(tokens * source.anatomy.hidden * source.placement.dtype.itemsize for source in sources)
        self._held = demand.held + demand.streams * states
        self._always = demand.always + max(loading_bytes(source) for source in sources)

    def __call__(self, scratch: Scratch, *, in_files: bool) -> int:
        demand, positions = self._demand, max(scratch.positions, self._rows)  # of every row one at least
        head = max(logit_bytes(source, positions, demand.logits) for source in self._sources)
        working = int(_SPARE * max(self._layer + demand.copies, head, demand.work + demand.copies))
        return working + self._always + (0 if in_files else self._held)


def _mask_bytes(batches: Sequence[Batch]) -> int:
    """Return what the masks of padded batches take."""
    return sum(4 * len(batch.tokens) * batch.tokens.shape[1] ** 2 for batch in batches if batch.mask is not None)


def _spread(limit: int | None, sources: Sequence[Source], demands: Demands) -> MemoryUse:
    """Divide the layers of every source among all devices of a kind; nothing is streamed."""
    from moesurgeon.engine.spread import devices_for

    demand = demands(BATCH_TOKENS)
    working = max(_Rest([source], demand)(Scratch(), in_files=True) for source in sources)
    for source in sources:
        source.supply.spread(devices_for(source.skeleton, source.placement.device.type, working))
    return MemoryUse(
        limit=limit,
        estimate=working + sum(source.supply.all_bytes for source in sources),
        scratch=Scratch(),
        batch_tokens=max((batch.tokens.numel() for batch in demand.batches), default=0),
        read_ahead=True,
        resident=True,
        hidden_in_files=False,
        shrunk=False,
    )


def free_bytes(limit: int | None, device: torch.device) -> int:
    """Return what may still be taken of the device's memory: up to ``limit`` (None: most of what is free)."""
    return _may_take(limit, device) - taken_bytes(limit, device)


def taken_bytes(limit: int | None, device: torch.device) -> int:
    """Return what counts as taken of ``limit`` before the work begins; nothing of what is free by itself."""
    if limit is None or device.type == "cuda":
        return 0
    used = free.used_bytes()
    return INTERPRETER if used + _LOADED_LATER <= INTERPRETER else used + _LOADED_LATER


def _may_take(limit: int | None, device: torch.device) -> int:
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
        return min(limit, available) if limit is not None else int(_SHARE * available)
    if limit is not None:
        return limit
    return int(_SHARE * free.available_bytes()) // launched.size_here()


def _refusal(limit: int | None, device: torch.device, needs: int, left: int, taken: int, whole: str | None) -> str:
    what = f"{whole} needs the checkpoint in memory, that is " if whole else "this needs "
    smaller = "shorten --length, or compute in a smaller --dtype"
    if limit is None or (device.type == "cuda" and needs > left and limit > left):
        where = f"of {device}" if device.type == "cuda" else "of the memory that is free"
        return f"{what}{enough(needs)}, and {said(max(0, left))} {where} may be used: free some, {smaller}"
    figure = enough(needs + taken)
    return f"{what}{figure}, --max-memory is {said(limit)}: give at least {figure}, {smaller}"
