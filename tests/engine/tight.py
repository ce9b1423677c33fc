"""Memory as tests want it, whatever this process and the machine have: in place of ``engine.budget.share_out``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moesurgeon.engine.budget import Demands, share_out
from moesurgeon.engine.memory_use import MemoryUse
from moesurgeon.engine.streams import Source

MUCH = 1 << 50


def plenty(_limit: int | None, sources: Sequence[Source], demands: Demands, **rest: Any) -> MemoryUse:
    """All fits."""
    return share_out(MUCH, sources, demands, **rest)


def tight(_limit: int | None, sources: Sequence[Source], demands: Demands, **_rest: Any) -> MemoryUse:
    """Two layers of each checkpoint fit, and no hidden states."""
    memory = share_out(MUCH, sources, demands)
    for source in sources:
        source.supply.allow(source.supply.least)
    return replace(memory, resident=False, hidden_in_files=True)
