"""Whether two checkpoints hold the same tensors, byte for byte."""

from __future__ import annotations

from moesurgeon.checkpoint.header import StoredTensor
from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.checkpoint.reader import ShardReader

_STEP = 8 << 20
_SAMPLE = 4096


def same_tensors(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether names, dtypes, shapes and all bytes agree, whatever the division into shards.

    Shards that are the same file (hard links, as ``retop --link`` makes them) are not read.
    """

    def described(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}

    if described(one) != described(other):
        return False
    with ShardReader(one) as mine, ShardReader(other) as theirs:
        return all(_same(one, tensor, mine, other, other.tensors[name], theirs) for name, tensor in one.tensors.items())


def look_the_same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Return whether two tensors of ``checkpoint`` agree in dtype, shape, and first, middle and last bytes."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    size = first.nbytes
    with ShardReader(checkpoint) as reader:
        return all(
            reader.read(first, start, min(start + _SAMPLE, size))
            == reader.read(second, start, min(start + _SAMPLE, size))
            for start in (0, size // 2, max(0, size - _SAMPLE))
        )


def _same(
    one: Checkpoint,
    tensor: StoredTensor,
    mine: ShardReader,
    other: Checkpoint,
    twin: StoredTensor,
    theirs: ShardReader,
) -> bool:
    if tensor.offset == twin.offset and one.path_of(tensor.shard).samefile(other.path_of(twin.shard)):
        return True
    return all(
        mine.read(tensor, start, min(start + _STEP, tensor.nbytes))
        == theirs.read(twin, start, min(start + _STEP, tensor.nbytes))
        for start in range(0, tensor.nbytes, _STEP)
    )
