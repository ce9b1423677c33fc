"""The ways in which most families store their experts: one by one, and as transformers 5 holds them."""

from __future__ import annotations

from collections.abc import Mapping

from moesurgeon.families.description import Layout

GATE_UP_DOWN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
W1_W3_W2 = {"gate": "w1", "up": "w3", "down": "w2"}


def both_layouts(
    rows: Mapping[str, int],
    *,
    block: str = "model.layers.{layer}.mlp",
    projections: Mapping[str, str] = GATE_UP_DOWN,
    shared: str | None = None,
    whole: tuple[str, ...] = (),
    running_block: str | None = None,
    running_rows: Mapping[str, int] | None = None,
) -> tuple[Layout, Layout]:
    """Return the layout with a tensor per expert and matrix, and the fused one.

    The fused one is what transformers 5 writes with ``save_original_format=False``: its own names in
    memory, ``running_...`` where those are others.
    """
    per_expert = Layout(
        name="per-expert",
        block=block,
        per_expert_rows=rows,
        expert="{block}.experts.{expert}.",
        projections=projections,
        shared=shared,
        whole=whole,
    )
    fused = Layout(
        name="fused",
        block=running_block or block,
        per_expert_rows=running_rows or rows,
        projections={"gate_up": "gate_up_proj", "down": "down_proj"},
        shared=shared,
        whole=whole,
    )
    return per_expert, fused
