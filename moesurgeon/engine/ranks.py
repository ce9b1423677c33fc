"""Several processes of one run (``accelerate launch`` or ``torchrun``): who does what, and how it comes together.

Batches are dealt out, not documents or tokens, and what each gave is put together in the order of the
batches. So every sum adds up the same numbers in the same order whatever the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon import launched
from moesurgeon.errors import OutputError

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ranks:
    """This process is ``number`` of ``size``."""

    number: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.number == 0

    def mine(self, count: int) -> range:
        """Return which of ``count`` batches are this process's."""
        return range(self.number, count, self.size)

    def least(self, value: int) -> int:
        """Return the least of the values that the processes have; none goes on before all have got here."""
        return int(self.gathered(np.array([[float(value)]]), self.size).min())

    def agrees(self, value: int) -> bool:
        """Whether all processes have the same value."""
        return self.least(value) == -self.least(-value)

    def summed(self, mine: torch.Tensor) -> torch.Tensor:
        """Return the sum of what the processes have, the same to the bit on all; OutputError if another has ended."""
        if self.size == 1:
            return mine
        from accelerate.utils import reduce

        try:
            found: torch.Tensor = reduce(mine, "sum")
        except (RuntimeError, ValueError) as error:
            raise _ended(error) from error
        return found

    def gathered(self, values: Array, count: int) -> Array:
        """Return what all processes have for ``count`` batches, in the order of the batches.

        ``values`` [N, ...]: what this one has for those of :meth:`mine`. Raises OutputError if another
        process has ended.
        """
        if self.size == 1:
            return values
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather

        most = -(-count // self.size)
        padded = np.zeros((most, *values.shape[1:]))
        padded[: len(values)] = values
        try:
            parts: Any = gather(torch.from_numpy(padded).to(PartialState().device))
        except (RuntimeError, ValueError) as error:
            raise _ended(error) from error
        # Of each process its batches one after the other: the transpose of how they were dealt out.
        ordered: Array = parts.cpu().numpy().reshape(self.size, most, *values.shape[1:]).swapaxes(0, 1)
        return ordered.reshape(self.size * most, *values.shape[1:])[:count]


def join_ranks(device: str, patience: timedelta | None = None) -> Ranks:
    """Join the processes that were launched together with this one, if there are any.

    ``device``: as the user said it; with "cpu" they talk over gloo whatever else the machine has. ``patience``: how
    long they wait for each other (None: as long as torch does, which is minutes). Raises OutputError if they do not
    find each other.
    """
    if launched.size() == 1:
        return Ranks()
    from accelerate import PartialState

    try:
        state = PartialState(cpu=device == "cpu", **({} if patience is None else {"timeout": patience}))
    except (RuntimeError, ValueError) as error:
        raise _ended(error) from error
    return Ranks(state.process_index, state.num_processes)


def _ended(error: Exception) -> OutputError:
    reason = " ".join(str(error).split())[:160]
    return OutputError(
        f"another process of this run ended or is out of reach ({reason}); see its message, run all again"
    )
