"""Routers whose numbers cannot be meant: NaN, rows off by orders of magnitude, rows that tie.

Routers are the only tensors that are small enough to be read by whoever only looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.checkpoint.values import floats_of
from moesurgeon.surgery.anatomy import Anatomy

if TYPE_CHECKING:  # imported where it is used: a bare checkpoint of headers needs none of it
    import numpy as np
    from numpy.typing import NDArray

# Trained rows of a router have norms within a factor of ten of each other.
_ORDERS = 100.0
# Trained selection biases stay below some tens; what masks an expert is far beyond.
_BIAS = 1e3


def odd_routers(anatomy: Anatomy, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what is odd in the routers of ``checkpoint``, a line for each tensor and kind of oddity."""
    import numpy as np

    with ShardReader(checkpoint) as reader, np.errstate(all="ignore"):
        for layer in anatomy.routed_layers:
            for name, role in anatomy.of_kind("rows", layer=layer):
                values = floats_of(reader, checkpoint.tensors[name])
                if values is None or role.axis >= values.ndim or values.shape[role.axis] != anatomy.experts:
                    continue
                rows = np.moveaxis(values, role.axis, 0).reshape(anatomy.experts, -1)
                yield from _of_numbers(name, rows)
                is_matrix = name.endswith(".weight")
                yield from _of_matrix(name, rows) if is_matrix else _of_bias(name, rows)


def _of_numbers(name: str, rows: NDArray[Any]) -> Iterator[str]:
    import numpy as np

    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        yield f"{name} holds NaN or infinities ({_experts(broken)}): what it routes is no choice; restore it"


def _of_matrix(name: str, rows: NDArray[Any]) -> Iterator[str]:
    import numpy as np

    norms = np.linalg.norm(np.where(np.isfinite(rows), rows, 0.0), axis=1)
    finite = np.isfinite(rows).all(axis=1)
    middle = float(np.median(norms[finite])) if finite.any() else 0.0
    off = np.flatnonzero(finite & ((norms > _ORDERS * middle) | (norms < middle / _ORDERS)))
    if len(off):
        worst = off[np.argmax(np.abs(np.log10(np.maximum(norms[off], 1e-30) / max(middle, 1e-30))))]
        yield (
            f"{name}: the rows of {_experts(off)} are off by orders (norm {norms[worst]:.3g}, the median is "
            f"{middle:.3g}): such an expert gets every token or none"
        )
    same = _alike(rows[finite])
    if same:
        numbers = np.flatnonzero(finite)[same]
        yield f"{name}: the rows of {_experts(numbers)} are copies of others: these experts tie on every token"


def _of_bias(name: str, rows: NDArray[Any]) -> Iterator[str]:
    import numpy as np

    off = np.flatnonzero(np.isfinite(rows).all(axis=1) & (np.abs(rows).max(axis=1) > _BIAS))
    if len(off):
        yield (
            f"{name}: {_experts(off)} {'is' if len(off) == 1 else 'are'} put out of reach or forced by a bias of "
            f"{rows[off[0]].flat[0]:.3g}"
        )


def _alike(rows: NDArray[Any]) -> list[int]:
    """Return the numbers of rows that equal an earlier one."""
    seen: set[bytes] = set()
    found = []
    for number, row in enumerate(rows):
        key = row.tobytes()
        if key in seen:
            found.append(number)
        seen.add(key)
    return found


def _experts(numbers: NDArray[np.intp]) -> str:
    listed = [int(number) for number in numbers]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return f"{'expert' if len(listed) == 1 else 'experts'} {', '.join(map(str, listed[:8]))}{more}"
