"""Tables whose values are experts: [vocabulary, K], the experts of every token (DeepSeek-V4's first layers).

V tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import CheckpointError
from moesurgeon.surgery.edits import Derived, Output, Pure, Slice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_STORED = {"I32": "<i4", "I64": "<i8"}


def without_experts(spec: TensorSpec, experts: int, kept: Sequence[int]) -> Pure:
    """Return a function from the bytes of a table to those without the experts that are not ``kept``, renumbered.

    An entry whose expert goes is given to one that stays and that its token does not have yet. Which one is
    a function of the table alone, and keeps the load even, as the table is made to be. Column by column the
    open entries, in the order of the tokens, are offered the expert with the fewest entries at that moment
    (of equals the first); offers that the token has already are refused, and those tokens get, in order,
    the expert with the fewest entries that they lack.

    The function raises CheckpointError if the table names an expert that the checkpoint does not have.
    """
    kept = sorted(kept)
    assert spec.shape[1] <= len(kept), "fewer experts than a token needs"

    def function(raw: bytes) -> bytes:
        import numpy as np

        table_VK = np.frombuffer(raw, dtype=np.dtype(_STORED[spec.dtype])).reshape(spec.shape)
        if table_VK.size and not (table_VK.min() >= 0 and table_VK.max() < experts):
            wrong = int(table_VK[(table_VK < 0) | (table_VK >= experts)][0])
            raise CheckpointError(f"{spec.name} names expert {wrong}, but there are {experts}; restore the table")
        new = np.full(experts, -1, dtype=table_VK.dtype)
        new[kept] = np.arange(len(kept))
        renumbered_VK = new[table_VK]
        _fill(renumbered_VK, len(kept))
        return bytes(renumbered_VK.tobytes())

    return Pure(f"without experts {spec.dtype} {list(spec.shape)} {experts} {kept}", function)


def first_columns(spec: TensorSpec, count: int) -> Output:
    """The first ``count`` experts of every token.

    One part that is made anew, not one per token: there are 130,000 of them.
    """
    stored, columns = int(_STORED[spec.dtype][-1]), spec.shape[1]
    smaller = TensorSpec(spec.name, spec.dtype, (spec.shape[0], count))

    def function(raw: bytes) -> bytes:
        import numpy as np

        rows = np.frombuffer(raw, dtype=np.uint8).reshape(-1, columns * stored)
        return bytes(rows[:, : count * stored].tobytes())

    whole = Slice(spec.name, 0, spec.nbytes)
    cut = Pure(f"first {count} of {columns} columns {spec.dtype}", function)
    return Output(smaller, (Derived(smaller.nbytes, (whole,), cut),), "select", (spec.name,))


def _fill(table_VK: NDArray[np.integer], experts: int) -> None:
    """Give every entry below 0 to one of ``experts`` in place, as ``without_experts`` says."""
    import numpy as np

    loads = np.bincount(table_VK[table_VK >= 0], minlength=experts)
    for column in range(table_VK.shape[1]):
        tokens = np.flatnonzero(table_VK[:, column] < 0)
        offers = _fewest_first(loads, len(tokens))
        refused = (table_VK[tokens] == offers[:, None]).any(axis=1)
        table_VK[tokens[~refused], column] = offers[~refused]
        loads += np.bincount(offers[~refused], minlength=experts)
        for token in tokens[refused]:  # a few: K of E
            row = table_VK[token]
            costs = loads.copy()
            costs[row[row >= 0]] = np.iinfo(costs.dtype).max
            row[column] = costs.argmin()
            loads[row[column]] += 1


def _fewest_first(loads: NDArray[np.integer], count: int) -> NDArray[np.integer]:
    """Return whom ``count`` entries go to, one after the other, if each goes to the one with the fewest."""
    import numpy as np

    # The level up to which the least loaded are filled, so that there is room for all.
    rising = np.sort(loads)
    filled = rising * np.arange(1, len(rising) + 1) - np.cumsum(rising)  # entries that fit below each of them
    lowest = int(np.searchsorted(filled, count, side="right"))  # so many share the room
    level = -(-(count + int(rising[:lowest].sum())) // lowest)
    room = np.maximum(level - loads, 0)
    takers = np.repeat(np.arange(len(loads)), room)
    places = np.arange(len(takers)) - np.repeat(np.cumsum(room) - room, room) + np.repeat(loads, room)
    return takers[np.lexsort((takers, places))][:count]
