"""Which of the processes of one run this one is, as ``accelerate launch`` and ``torchrun`` say it.

Only their environment variables are read, so that what has no need of torch can ask.
"""

from __future__ import annotations

import os


def rank() -> int:
    """Return the number of this process, from 0; 0 without a launcher."""
    return _number("RANK", 0) if size() > 1 else 0


def size() -> int:
    """Return how many processes there are."""
    return _number("WORLD_SIZE", 1)


def size_here() -> int:
    """Return how many of them share this machine."""
    return _number("LOCAL_WORLD_SIZE", 1) if size() > 1 else 1


def divides_weights() -> bool:
    """Whether ``accelerate launch`` was told to divide the weights among the processes (FSDP, DeepSpeed, Megatron)."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
    return any(os.environ.get(name, "false").lower() == "true" for name in names)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
