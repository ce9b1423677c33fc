"""What can happen to a tensor, as data: every edit says which bytes of the source an output is made of.

An :class:`Output` is a tensor of the result: its spec, the parts that its bytes consist of, and the
verb that made it. The verbs are functions: :func:`copy`, :func:`rename`, :func:`select`,
:func:`replace`, :func:`transform`, :func:`add`, :func:`join`, :func:`split`. Nothing is read or written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields

from moesurgeon.checkpoint.header import DTYPE_BITS, TensorSpec
from moesurgeon.checkpoint.writer import Fresh


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes ``start`` to ``stop`` of the tensor ``tensor`` of the source."""

    tensor: str
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Pure:
    """A function of bytes and nothing else. ``key`` names it with all its parameters: same key, same result."""

    key: str
    function: Callable[[bytes], bytes]

    def __call__(self, data: bytes) -> bytes:
        return self.function(data)


@dataclass(frozen=True, slots=True)
class Derived:
    """``length`` bytes that ``function`` makes of the joined bytes of ``parts``."""

    length: int
    parts: tuple[Part, ...]
    function: Pure


Part = Slice | Fresh | Derived


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of the result. ``sources``: the tensors of the source that it stands for.

    ``beside``: whose shard it goes to; without one the first source's.
    """

    spec: TensorSpec
    parts: tuple[Part, ...]
    verb: str
    sources: tuple[str, ...]
    beside: str | None = None

    @property
    def is_untouched(self) -> bool:
        return self.verb == "copy"

    @property
    def home(self) -> str:
        """The tensor of the source whose shard this one goes to."""
        return self.sources[0] if self.beside is None else self.beside


def copy(spec: TensorSpec) -> Output:
    """The tensor as it is."""
    return Output(spec, (Slice(spec.name, 0, spec.nbytes),), "copy", (spec.name,))


def rename(output: Output, name: str) -> Output:
    """The same bytes under another name."""
    if name == output.spec.name:
        return output
    verb = "rename" if output.verb == "copy" else output.verb
    return with_fields(output, spec=TensorSpec(name, output.spec.dtype, output.spec.shape), verb=verb)


def select(spec: TensorSpec, axis: int, kept: Sequence[int], *, rows: int = 1) -> Output:
    """Entries ``kept`` (in this order) of ``axis``: rows for axis 0, columns of ``[1, E]`` for axis 1.

    ``rows``: how many consecutive positions make an entry.
    """
    outer = math.prod(spec.shape[:axis])
    assert spec.shape[axis] % rows == 0, f"{spec} does not divide into entries of {rows}"
    count = spec.shape[axis] // rows
    bits = rows * math.prod(spec.shape[axis + 1 :]) * DTYPE_BITS[spec.dtype]
    assert bits % 8 == 0, f"{spec} has entries that do not begin at bytes"
    step = bits // 8
    parts = tuple(
        Slice(spec.name, (block * count + index) * step, (block * count + index + 1) * step)
        for block in range(outer)
        for index in kept
    )
    shape = (*spec.shape[:axis], len(kept) * rows, *spec.shape[axis + 1 :])
    return Output(TensorSpec(spec.name, spec.dtype, shape), parts, "select", (spec.name,))


def replace(spec: TensorSpec, load: Callable[[], bytes], *, key: str) -> Output:
    """New bytes of the same dtype and shape, made by ``load`` when they are written; ``key`` as in Fresh."""
    return Output(spec, (Fresh(spec.nbytes, load, key),), "replace", (spec.name,))


def transform(spec: TensorSpec, function: Pure) -> Output:
    """The tensor's own bytes passed through ``function``, which keeps their number."""
    whole = Slice(spec.name, 0, spec.nbytes)
    return Output(spec, (Derived(spec.nbytes, (whole,), function),), "transform", (spec.name,))


def add(spec: TensorSpec, load: Callable[[], bytes], *, key: str, beside: str) -> Output:
    """A tensor that the source does not have, stored in the shard of ``beside``; ``key`` as in Fresh.

    It accounts for no tensor of the source: ``beside`` itself has to be kept or dropped as well.
    """
    return Output(spec, (Fresh(spec.nbytes, load, key),), "add", (), beside)


def join(name: str, pieces: Sequence[TensorSpec], shape: tuple[int, ...]) -> Output:
    """The pieces' bytes one after the other, as one tensor of ``shape``."""
    spec = TensorSpec(name, pieces[0].dtype, shape)
    parts = tuple(Slice(piece.name, 0, piece.nbytes) for piece in pieces)
    return Output(spec, parts, "join", tuple(piece.name for piece in pieces))


def split(spec: TensorSpec, name: str, start: int, stop: int, shape: tuple[int, ...]) -> Output:
    """Bytes ``start`` to ``stop`` of a tensor as one of their own."""
    return Output(TensorSpec(name, spec.dtype, shape), (Slice(spec.name, start, stop),), "split", (spec.name,))
