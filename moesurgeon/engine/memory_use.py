"""What was decided about memory, as reports and people have it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moesurgeon.engine.scratch import Scratch


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What was decided. ``limit``: the bytes of ``--max-memory`` (None: most of what is free). ``estimate``: bytes at
    most beside the interpreter. ``batch_tokens``: of the largest batch. ``shrunk``: whether batches, logits or reading
    ahead are less than usual. ``scratch`` is what batches are made by.
    """

    limit: int | None
    estimate: int
    scratch: Scratch
    batch_tokens: int
    read_ahead: bool
    resident: bool
    hidden_in_files: bool
    shrunk: bool

    def as_dict(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "limit": self.limit,
            "estimate": self.estimate,
            "batch_tokens": self.batch_tokens,
            "logit_positions": self.scratch.positions,
            "read_ahead": self.read_ahead,
            "hidden_in_files": self.hidden_in_files,
            "shrunk": self.shrunk,
        }

    @property
    def note(self) -> str | None:
        """Say in a line what was made smaller; None where nothing was."""
        if not self.shrunk:
            return None
        ways = [f"batches of {self.batch_tokens:,} tokens", f"logits of {self.scratch.positions:,} positions at once"]
        ways += [] if self.read_ahead else ["one layer at a time, none read ahead (slower)"]
        ways += ["hidden states in files"] if self.hidden_in_files else []
        budget = "the memory that is free" if self.limit is None else f"--max-memory {said(self.limit)}"
        return f"note: to fit into {budget}: {', '.join(ways)}; about {said(self.estimate)} beside the interpreter"


def enough(nbytes: int) -> str:
    """Return a size that surely holds ``nbytes``, as ``--max-memory`` takes it.

    >>> enough(1_234_567_890), enough(520_000_000)
    ('1.25GB', '530MB')
    """
    rounded = math.ceil(nbytes * 1.01 / 1e7)
    return f"{rounded / 100:.2f}GB" if rounded >= 100 else f"{rounded * 10}MB"


def said(nbytes: int) -> str:
    """Return a size as people read it.

    >>> said(1_500_000_000), said(3_000_000_000), said(512_000), said(0)
    ('1.5GB', '3GB', '512kB', '0B')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f}".rstrip("0").rstrip(".") + unit
    return f"{nbytes}B"
