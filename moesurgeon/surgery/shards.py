"""From the outputs of a plan to files: which tensor goes where, and which bytes it is made of."""

from __future__ import annotations

from collections.abc import Mapping
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


def plan_shards(plan: EditPlan, source: Checkpoint) -> list[OutputShard]:
    """Group the outputs into files like the source's: each goes where its first source was.

    A shard with nothing left in it goes away. Within a shard wider dtypes come first, so that every
    tensor is aligned whatever was cut: the order of the safetensors library's own files.
    """
    by_home: dict[str, list[Output]] = {shard: [] for shard in source.headers}
    for output in plan.outputs.values():
        by_home[source.tensors[output.sources[0]].shard].append(output)
    homes = [(home, outputs) for home, outputs in by_home.items() if outputs]
    keep_names = len(homes) == len(source.headers)
    shards = []
    for number, (home, outputs) in enumerate(homes, start=1):
        outputs.sort(key=lambda output: (source.tensors[output.sources[0]].offset, output.spec.name))
        outputs.sort(key=lambda output: -DTYPE_BITS[output.spec.dtype])
        name = f"model-{number:05d}-of-{len(homes):05d}.safetensors" if source.is_sharded else SINGLE_NAME
        stored = source.headers[home]
        untouched = all(output.is_untouched for output in outputs) and len(outputs) == len(stored.tensors)
        shards.append(
            OutputShard(home if keep_names else name, tuple(outputs), stored.metadata, home if untouched else None)
        )
    return shards


def compiled(shard: OutputShard, source: Checkpoint, reader: ShardReader) -> ShardPlan:
    """Return ``shard`` as ranges of the source's files and bytes made when they are written."""

    def file_part(part: Part) -> FilePart:
        if isinstance(part, Slice):
            tensor = source.tensors[part.tensor]
            return FileRange(tensor.shard, tensor.offset + part.start, part.length)
        if isinstance(part, Derived):
            return Fresh(part.length, lambda: bytes_of(part, source, reader))
        return part

    tensors = tuple(
        PlannedTensor(output.spec, tuple(file_part(part) for part in output.parts)) for output in shard.outputs
    )
    return ShardPlan(shard.name, tensors, shard.metadata)


def bytes_of(part: Part, source: Checkpoint, reader: ShardReader) -> bytes:
    """Return the bytes that ``part`` stands for."""
    if isinstance(part, Slice):
        return reader.read(source.tensors[part.tensor], part.start, part.stop)
    if isinstance(part, Derived):
        return part.function(b"".join(bytes_of(inner, source, reader) for inner in part.parts))
    return part.load()
