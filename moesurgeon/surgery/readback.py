"""Reading a result back before it gets its final name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.checkpoint.open import Checkpoint, open_checkpoint
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.errors import CheckpointError, OutputError
from moesurgeon.surgery.anatomy import examine
from moesurgeon.surgery.completeness import problems_of
from moesurgeon.surgery.edits import Output, Slice
from moesurgeon.surgery.plan import EditPlan

_SAMPLE = 256


def read_back(folder: Path, plan: EditPlan, source: Checkpoint, reader: ShardReader) -> Checkpoint:
    """Open ``folder`` as any user would and hold it against ``plan``; OutputError if they differ.

    Headers, index, names, shapes and completeness are compared in full, the content of every copied
    range by its first and last bytes.
    """
    try:
        written = open_checkpoint(folder)
        anatomy = examine(written.config, written.tensors)
    except CheckpointError as error:
        raise OutputError(f"the output did not read back: {error}; nothing was left behind") from error
    problems = problems_of(anatomy)
    if problems:
        raise OutputError(f"the output is not complete: {problems[0]}; nothing was left behind")
    specs = {name: output.spec for name, output in plan.outputs.items()}
    if not same_specs(written.tensors, specs):
        raise OutputError("the output holds other tensors than planned; nothing was left behind")
    with ShardReader(written) as result:
        for name, output in plan.outputs.items():
            if not _samples_agree(name, output, source, reader, written, result):
                raise OutputError(
                    f"{name} differs from its source after writing; nothing was left behind, check the disk"
                )
    return written


def same_specs(one: Mapping[str, TensorSpec], other: Mapping[str, TensorSpec]) -> bool:
    """Whether both have the same tensors, wherever they are stored."""
    return len(one) == len(other) and all(
        (twin := other.get(name)) is not None and twin.dtype == spec.dtype and twin.shape == spec.shape
        for name, spec in one.items()
    )


def _samples_agree(
    name: str,
    output: Output,
    source: Checkpoint,
    reader: ShardReader,
    written: Checkpoint,
    result: ShardReader,
) -> bool:
    position = 0
    parts = output.parts
    # Of a tensor made of thousands of ranges, the first and the last few will do.
    checked = set(range(len(parts))) if len(parts) <= 8 else {0, 1, len(parts) - 2, len(parts) - 1}
    for number, part in enumerate(parts):
        if number in checked and isinstance(part, Slice):
            sample = min(_SAMPLE, part.length)
            for start in {0, part.length - sample}:
                there = result.read(written.tensors[name], position + start, position + start + sample)
                low = part.start + start
                if there != reader.read(source.tensors[part.tensor], low, low + sample):
                    return False
        position += part.length
    return True
