"""How memory is shared out between weights, hidden states and what a batch needs while it computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from moesurgeon import launched
from moesurgeon.engine.batches import Batch
from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Source
from moesurgeon.errors import UsageError
from moesurgeon.families.keys import count_of
from moesurgeon.surgery.anatomy import Anatomy

LOGIT_POSITIONS = 2048
"""Positions whose logits are held at once."""
# Of the free memory, where the user names no limit: the rest is for the page cache and for others.
_SHARE = 0.8


def share_out(
    limit: int | None, sources: Sequence[Source], batches: Sequence[Batch], *, work: int = 0, held: int = 0
) -> bool:
    """Divide ``limit`` bytes (None: most of what is free) of the device's memory; return whether all is to fit.

    Every source is told what its weights may take, the first one first. On a CPU the limit is that of the
    whole process, so what it uses already is taken off. Hidden states stay in memory if they fit beside two
    layers of every source; where they do not, False is returned: they have to go to a file. ``work``: bytes that
    are needed in memory besides, whatever happens; ``held``: bytes that go where the hidden states go. Raises
    UsageError if not even two layers fit.
    """
    placement = sources[0].placement
    working = work + max(working_bytes(source.anatomy, placement, batches) for source in sources)
    if placement.spread:
        from moesurgeon.engine.spread import devices_for

        for source in sources:
            source.supply.spread(devices_for(source.skeleton, placement.device.type, working))
        return True
    free = free_bytes(limit, placement.device) - working
    tokens = sum(batch.tokens.numel() for batch in batches)
    hidden = held + sum(tokens * source.anatomy.hidden * placement.dtype.itemsize for source in sources)
    least = [source.supply.least for source in sources]
    fits = free - hidden >= sum(least)
    if fits:
        free -= hidden
    if free < sum(least):
        raise UsageError(
            f"{'the memory that is free' if limit is None else '--max-memory'} leaves {max(0, free):,} bytes for "
            f"weights, but two layers at a time need {sum(least):,}; {'free some' if limit is None else 'raise it'}, "
            "shorten --length, or compute in a smaller --dtype"
        )
    for number, source in enumerate(sources):
        others = sum(least[number + 1 :])
        source.supply.allow(free - others)
        free -= source.supply.plan.nbytes
    return fits


def working_bytes(anatomy: Anatomy, placement: Placement, batches: Sequence[Batch]) -> int:
    """Return about what the largest batch needs in a layer, or its block of logits in the head.

    In a layer: queries, keys, values and residuals (16 x hidden), and for each expert of a token its gate, up,
    activation and output; in the head the float32 logits of a block with their softmax and a copy.
    """
    tokens = max((batch.tokens.numel() for batch in batches), default=0)
    wide = max(anatomy.expert_width, count_of(anatomy.config, "intermediate_size", 0) // max(1, anatomy.top_k))
    layer = tokens * (16 * anatomy.hidden + anatomy.top_k * (4 * wide + 2 * anatomy.hidden)) * placement.dtype.itemsize
    head = LOGIT_POSITIONS * count_of(anatomy.config, "vocab_size", 0) * 4 * 4
    return max(layer, head)


def free_bytes(limit: int | None, device: torch.device) -> int:
    """Return what may still be taken of the device's memory: up to ``limit`` (None: most of what is free)."""
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
        return min(limit, available) if limit is not None else int(_SHARE * available)
    if limit is not None:
        return limit - int(psutil.Process().memory_info().rss)
    return int(_SHARE * _available()) // launched.size_here()


def _available() -> int:
    """Return the bytes that this process may still take: by the kernel, or by its control group if that is less."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        if most != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            cached = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            available = min(available, int(most) - used + int(cached.get("file", 0)))
    except (OSError, ValueError):  # no control groups, or an older kind of them
        pass
    return available
