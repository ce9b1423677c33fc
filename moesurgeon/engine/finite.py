"""Hidden states that are no numbers any more: stopped where they come up, with the tensors that are to blame."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moesurgeon.engine.destinations import Piece
from moesurgeon.errors import CheckpointError

_OVERFLOW = "its weights are finite, so what it computes overflows in this --dtype; try float32"


class NotFinite(CheckpointError):
    """Hidden states or outputs are no numbers. Who looks at a block need not know the tensors; the walk names them."""


def error_after(
    where: str,
    tensors: Mapping[str, torch.Tensor],
    pieces: Mapping[str, tuple[Piece, ...]],
    otherwise: NotFinite | None = None,
) -> NotFinite:
    """Return what to raise for hidden states that are not finite after ``where``, which computed with ``tensors``.

    ``pieces``: which stored tensors each was put together from. ``otherwise``: for tensors that are all finite.
    """
    names = culprits(tensors, pieces)
    if not names:
        return otherwise or NotFinite(f"{where}: hidden states are not finite; {_OVERFLOW}")
    more = f" and {len(names) - 3} tensors more" if len(names) > 3 else ""
    hold = "holds" if len(names) == 1 else "hold"
    return NotFinite(
        f"{where}: hidden states are not finite, since {', '.join(names[:3])}{more} {hold} NaN or infinities; restore "
        "the checkpoint"
    )


def culprits(tensors: Mapping[str, torch.Tensor], pieces: Mapping[str, tuple[Piece, ...]]) -> list[str]:
    """Return the stored names of those ``tensors`` that hold a value that is not finite."""
    found = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            continue
        parts = pieces.get(name, ())
        named = [piece.source for piece in parts if not bool(piece.view(tensor).isfinite().all())]
        found += named or [name]
    return sorted(found)
