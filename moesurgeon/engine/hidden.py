"""The hidden states of all batches between two layers, in memory or, above a budget, in a file.

A walk needs them all at once, since every layer is given every batch before the next one is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from moesurgeon.errors import OutputError

Shape = tuple[int, int, int]


class HiddenStates:
    """Hidden states [B, T, H] by batch. ``path``: hold them in a file there; None: in memory, on the device where
    they were made.

    A file is mapped: what was used last is in memory as long as there is room. ``keep``: what a layer was
    given stays until the one after it is done, in a second file, and :meth:`turn_to` changes between them.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        path: Path | None = None,
        *,
        keep: bool = False,
    ) -> None:
        assert path is not None or not keep, "only files are kept"
        self._in_file = path is not None
        # In memory nothing is copied: what a layer returned is held until it is replaced.
        self._sides: list[list[torch.Tensor]] = [[torch.empty(0)] * len(shapes)]
        if path is not None:
            # The one of an even number of layers is the first.
            paths = [path, path.with_name(path.name + ".odd")] if keep else [path]
            self._sides = [mapped(shapes, dtype, place) for place in paths]
        self._from = 0

    def get(self, batch: int) -> torch.Tensor:
        """Return the states of ``batch``, not to be written to."""
        return self._sides[self._from][batch]

    def put(self, batch: int, states: torch.Tensor, *, layer: int = -1) -> None:
        """Store what ``layer`` made of ``batch`` (-1: the embedding)."""
        side = self._sides[(layer + 1) % len(self._sides)]
        if self._in_file:
            side[batch].copy_(states)
        else:
            side[batch] = states

    def turn_to(self, layers: int) -> None:
        """Let :meth:`get` return what there was after ``layers`` layers."""
        self._from = layers % len(self._sides)


def mapped(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, path: Path, what: str = "hidden states"
) -> list[torch.Tensor]:
    """Return tensors of ``shapes`` in the file ``path``, which is made as large as they are and keeps what it holds."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    count = max(1, sum(sizes))
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Now or never: a mapping that finds the disk full ends the process without a word.
            os.posix_fallocate(file, 0, count * dtype.itemsize)
        finally:
            os.close(file)
        memory = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise OutputError(f"{what} cannot be held in {path} ({reason}); choose another disk") from error
    return [part.view(shape) for part, shape in zip(memory[: sum(sizes)].split(sizes), shapes, strict=True)]
