"""How much is computed at once: what a memory budget makes smaller before it refuses."""

from __future__ import annotations

from dataclasses import dataclass

BATCH_TOKENS = 8192
"""Tokens of a batch: enough for matrices, little enough for memory."""
LOGIT_POSITIONS = 2048
"""Positions whose logits are held at once."""
MASK_BYTES = 256 << 20
"""Of padded batches' masks that are kept from layer to layer."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """``tokens`` that go through a layer, or through a block alone, at once; ``positions`` whose logits are held at
    once; ``masks``: bytes of padded batches' masks that are kept. Results agree to rounding, whatever these are."""

    tokens: int = BATCH_TOKENS
    positions: int = LOGIT_POSITIONS
    masks: int = MASK_BYTES
