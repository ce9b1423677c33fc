"""The edit plan: what the result consists of, and what becomes of every tensor of the source.

A plan is made from headers, checked before anything is written, printed by ``--dry-run`` and applied
by the one writer. Plans compose: the second is made from the anatomy that the first results in.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.checkpoint.writer import Fresh
from moesurgeon.errors import CheckpointError
from moesurgeon.families.keys import REMOVED, with_value
from moesurgeon.surgery.anatomy import Anatomy, examine
from moesurgeon.surgery.edits import Derived, Output, Part, Pure, Slice, copy, rename


@dataclass(frozen=True)
class EditPlan:
    """``outputs`` by name; ``dropped`` maps tensors to the reason; ``config`` maps keys (dotted where nested) to
    values, REMOVED among them.

    ``record`` says what was done, for the provenance file: one JSON object per operation. ``files``: small texts that
    the result has beside its weights, by name.
    """

    outputs: Mapping[str, Output]
    dropped: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    record: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def changes_nothing(self) -> bool:
        """Whether the result would be the source, tensor by tensor and key by key."""
        said = self.dropped or self.config or self.files
        return not said and all(output.is_untouched for output in self.outputs.values())

    @property
    def nbytes(self) -> int:
        return sum(output.spec.nbytes for output in self.outputs.values())

    def edited_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``config`` with this plan's edits; order and unknown keys stay."""
        edited = dict(config)
        for key, value in self.config.items():
            edited = with_value(edited, key, value)
        return edited

    def result(self, source: Anatomy) -> Anatomy:
        """Return the anatomy of what this plan makes of ``source``."""
        specs = {name: output.spec for name, output in self.outputs.items()}
        return examine(self.edited_config(source.config), specs)

    def summary(self) -> dict[str, Any]:
        """Return counts of edits and the reasons for drops, for people and for JSON."""
        return {
            "tensors": dict(Counter(output.verb for output in self.outputs.values())),
            "dropped": dict(Counter(self.dropped.values())),
            "config": {key: None if value is REMOVED else value for key, value in self.config.items()},
            "bytes": self.nbytes,
            "operations": list(self.record),
            "files": sorted(self.files),
        }

    def check(self, source: Mapping[str, TensorSpec]) -> None:
        """Refuse a plan that does not account for every tensor of ``source`` exactly once.

        Each one is kept, edited or dropped; no byte of it is used twice; parts fill their outputs.
        (So a tensor that was transformed cannot be split in a later step: each piece needs all of it.)
        """
        used: dict[str, Slice | list[Slice]] = {}  # one alone as it is: plans have 100,000 of them
        touched: set[str] = set()
        unknown = {name for name in self.dropped if name not in source}
        for name, output in self.outputs.items():
            assert name == output.spec.name
            if sum(part.length for part in output.parts) != output.spec.nbytes:
                raise CheckpointError(f"refused: the plan fills {name!r} with the wrong number of bytes")
            touched.update(output.sources)
            unknown.update(name for name in (output.home, *output.sources) if name not in source)
            for part in slices_of(output.parts):
                before = used.get(part.tensor)
                if before is None:
                    used[part.tensor] = part
                elif isinstance(before, list):
                    before.append(part)
                else:
                    used[part.tensor] = [before, part]
        unknown.update(name for name in used if name not in source)
        twice = {name for name in self.dropped if name in touched}
        forgotten = {name for name in source if name not in touched and name not in self.dropped}
        for problem, names in (
            ("unknown", unknown),
            ("both used and dropped", twice),
            ("forgotten", forgotten),
        ):
            if names:
                raise CheckpointError(
                    f"refused: {sorted(names)[0]!r} is {problem} in the plan; this is a bug, report it"
                )
        for tensor, found in used.items():
            slices = sorted(found, key=lambda part: part.start) if isinstance(found, list) else [found]
            for one, other in itertools.pairwise(slices):
                if other.start < one.stop:
                    raise CheckpointError(f"refused: the plan uses bytes of {tensor!r} twice; this is a bug, report it")
            if slices[-1].stop > source[tensor].nbytes:
                raise CheckpointError(f"refused: the plan reads past the end of {tensor!r}; this is a bug, report it")


def identity(source: Anatomy) -> EditPlan:
    """The plan that changes nothing."""
    return EditPlan(outputs={name: copy(spec) for name, spec in source.tensors.items()})


def compose(first: EditPlan, second: EditPlan) -> EditPlan:
    """Return the one plan that does what ``first`` and then ``second`` do.

    ``second`` must have been made from ``first.result(source)``.
    """
    outputs = {name: _through(output, first) for name, output in second.outputs.items()}
    used = {tensor for output in outputs.values() for tensor in output.sources}
    dropped = dict(first.dropped)
    for name, reason in second.dropped.items():
        dropped |= {tensor: reason for tensor in first.outputs[name].sources if tensor not in used}
    config = {**first.config, **second.config}
    files = {**first.files, **second.files}
    return EditPlan(outputs, dropped, config, [*first.record, *second.record], files)


def _through(output: Output, first: EditPlan) -> Output:
    """Express ``output``, made from results of ``first``, by what those were made from."""
    before = [first.outputs[name] for name in output.sources]
    sources = tuple(dict.fromkeys(tensor for made in before for tensor in made.sources))
    if output.is_untouched:
        return before[0]
    if output.verb == "rename":
        return rename(before[0], output.spec.name)
    home = first.outputs[output.home].home
    return Output(output.spec, _resolved(output.parts, first), output.verb, sources, home)


def slices_of(parts: Iterable[Part]) -> Iterator[Slice]:
    """Yield every range of the source in ``parts``, those inside derived parts included."""
    for part in parts:
        if isinstance(part, Slice):
            yield part
        elif isinstance(part, Derived):
            yield from slices_of(part.parts)


def _resolved(parts: Iterable[Part], first: EditPlan) -> tuple[Part, ...]:
    """Return what ``parts``, bytes of results of ``first``, were made of.

    Pieces of something made anew that follow each other become one part, so that it is made once.
    """
    cuts = [cut for part in parts for cut in _cuts(part, first)]
    by_piece = itertools.groupby(cuts, key=lambda cut: id(cut[0]))
    return tuple(made for _, group in by_piece for made in _taken(list(group)))


def _cuts(part: Part, first: EditPlan) -> Iterator[tuple[Part, int, int]]:
    """Yield (piece, low, high): the ranges of what results of ``first`` consist of that make up ``part``."""
    if isinstance(part, Fresh):
        yield part, 0, part.length
    elif isinstance(part, Derived):
        yield Derived(part.length, _resolved(part.parts, first), part.function), 0, part.length
    else:
        position = 0
        for piece in first.outputs[part.tensor].parts:
            low, high = max(part.start - position, 0), min(part.stop - position, piece.length)
            if low < high:
                yield piece, low, high
            position += piece.length


def _taken(cuts: list[tuple[Part, int, int]]) -> Iterator[Part]:
    """Yield parts for ``cuts``, which are all of one piece."""
    piece = cuts[0][0]
    ranges = [(low, high) for _, low, high in cuts]
    if isinstance(piece, Slice):
        for low, high in ranges:
            yield Slice(piece.tensor, piece.start + low, piece.start + high)
    elif ranges == [(0, piece.length)]:
        yield piece
    else:
        length = sum(high - low for low, high in ranges)
        cut = Pure(f"cut {ranges}", lambda data: b"".join(data[low:high] for low, high in ranges))
        yield Derived(length, (piece,), cut)
