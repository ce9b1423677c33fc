"""Tensors with an entry per expert that a checkpoint may hold whatever its family: names. Data only.

Quantisers store scales beside the router's weight; selection biases have the names that families give them.
"""

from __future__ import annotations

ROUTER_SCALES = (
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_zero_point",
    "scale",
)
"""Beside the router's weight [E, H]: one for all rows, one per row, or one per block of rows and columns."""

BLOCK_SCALES = ("weight_scale_inv",)
"""Of these, what is stored per block only."""

ROUTER_ROWS = ("SCB", "bias")
"""Beside the router's weight: always one per row."""

SELECTION_BIASES = ("e_score_correction_bias", "expert_bias", "moe_statics.e_score_correction_bias")
"""On the router or on the block: [E] or [1, E]."""
