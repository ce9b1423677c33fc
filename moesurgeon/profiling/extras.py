"""What a profile may take besides its statistics, on the same walk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from moesurgeon.engine.observe import Visitor
from moesurgeon.engine.ranks import Array, Ranks


class Extra(Protocol):
    """Somebody who looks at the blocks after the collector has.

    ``arrays``: float64 sums of the layers that are done, which a killed walk goes on with.
    """

    @property
    def arrays(self) -> Mapping[str, Array]: ...

    def visitor(self, number: int) -> Visitor | None:
        """Return who looks at a layer's block while batch ``number`` (of all processes) goes through; None: nobody."""
        ...

    def gather(self, layer: int, first: int, ranks: Ranks) -> None:
        """Put together what all processes saw of ``layer`` in this round, whose first batch is ``first``."""
        ...

    def finish(self, layer: int) -> None:
        """End ``layer``: what is not in ``arrays`` has to be on the disk now."""
        ...
