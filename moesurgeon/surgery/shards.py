"""From the outputs of a plan to files: which tensor goes where, and which bytes it is made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moesurgeon.checkpoint.header import DTYPE_BITS
from moesurgeon.checkpoint.open import SINGLE_NAME, Checkpoint
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.checkpoint.writer import FileRange, Fresh, PlannedTensor, ShardPlan
from moesurgeon.checkpoint.writer import Part as FilePart
from moesurgeon.surgery.edits import Derived, Output, Part, Slice
from moesurgeon.surgery.plan import EditPlan


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One file of the result. ``equals``: the source shard with the same tensors, if there is one."""

    name: str
    outputs: tuple[Output, ...]
    metadata: Mapping[str, str]
    equals: str | None

    @property
    def nbytes(self) -> int:
        return sum(output.spec.nbytes for output in self.outputs)


def plan_shards(plan: EditPlan, source: Checkpoint, shard_size: int | None = None) -> list[OutputShard]:
    """Group the outputs into files like the source's: each goes where its home was.

    A shard with nothing left in it goes away. With ``shard_size`` the outputs, in the same order, fill
    files of at most so many bytes of tensors; a tensor that is larger has a file of its own. Within a
    shard wider dtypes come first, so that every tensor is aligned whatever was cut: the order of the
    safetensors library's own files.
    """
    by_home: dict[str, list[Output]] = {shard: [] for shard in source.headers}
    for output in plan.outputs.values():
        by_home[source.tensors[output.home].shard].append(output)
    homes = [outputs for outputs in by_home.values() if outputs]
    for outputs in homes:
        outputs.sort(key=lambda output: (source.tensors[output.home].offset, output.spec.name))
    groups = homes if shard_size is None else list(_filled(homes, shard_size))
    names = _names(len(groups), source, resized=shard_size is not None)
    shards = []
    for name, outputs in zip(names, groups, strict=True):
        outputs.sort(key=lambda output: -DTYPE_BITS[output.spec.dtype])
        home = source.tensors[outputs[0].home].shard
        stored = source.headers[home]
        same = {tensor.name for tensor in stored.tensors} == {output.spec.name for output in outputs}
        untouched = same and all(output.is_untouched for output in outputs)
        shards.append(OutputShard(name, tuple(outputs), stored.metadata, home if untouched else None))
    return shards


def has_index(shards: Sequence[OutputShard], source: Checkpoint, shard_size: int | None) -> bool:
    """Whether the files need an index: several do, and one does that stays as the source had it."""
    return len(shards) > 1 or (source.is_sharded and shard_size is None)


def _names(count: int, source: Checkpoint, *, resized: bool) -> list[str]:
    if not resized and count == len(source.headers):
        return list(source.headers)
    if count == 1 and (resized or not source.is_sharded):
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _filled(homes: Iterable[list[Output]], shard_size: int) -> Iterator[list[Output]]:
    """Yield the outputs in groups of at most ``shard_size`` bytes, or of one that is larger."""
    group: list[Output] = []
    filled = 0
    for output in itertools.chain.from_iterable(homes):
        if group and filled + output.spec.nbytes > shard_size:
            yield group
            group, filled = [], 0
        group.append(output)
        filled += output.spec.nbytes
    if group:
        yield group


def compiled(shard: OutputShard, source: Checkpoint, reader: ShardReader) -> ShardPlan:
    """Return ``shard`` as ranges of the source's files and bytes made when they are written."""

    def file_part(part: Part) -> FilePart:
        if isinstance(part, Slice):
            tensor = source.tensors[part.tensor]
            return FileRange(tensor.shard, tensor.offset + part.start, part.length)
        if isinstance(part, Derived):
            return Fresh(part.length, lambda: bytes_of(part, source, reader), _key_of(part))
        return part

    tensors = tuple(
        PlannedTensor(output.spec, tuple(file_part(part) for part in output.parts)) for output in shard.outputs
    )
    return ShardPlan(shard.name, tensors, shard.metadata, shard.equals)


def _key_of(part: Part) -> str:
    """Return what tells the bytes of ``part`` from others made of the same source."""
    if isinstance(part, Slice):
        return f"{part.tensor!r}[{part.start}:{part.stop}]"
    if isinstance(part, Derived):
        return f"{part.function.key} of ({', '.join(map(_key_of, part.parts))})"
    return part.key


def bytes_of(part: Part, source: Checkpoint, reader: ShardReader) -> bytes:
    """Return the bytes that ``part`` stands for."""
    if isinstance(part, Slice):
        return reader.read(source.tensors[part.tensor], part.start, part.stop)
    if isinstance(part, Derived):
        return part.function(b"".join(bytes_of(inner, source, reader) for inner in part.parts))
    return part.load()
