"""Where the data of a layer and the healed tensors are while the walk goes on: they may be larger than memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moesurgeon.engine.hidden import mapped


class Room:
    """Memory in files of ``folder``, mapped; None: plain memory. ``name``: before that of what is held to the end."""

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        self._folder, self._name = folder, name
        self._kept = 0

    @property
    def is_in_memory(self) -> bool:
        return self._folder is None

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return memory on ``device``, or in the file ``name``, which what had that name before gives up."""
        if self._folder is None:
            return torch.empty(*shape, dtype=dtype, device=device)
        return mapped([tuple(shape)], dtype, self._folder / name)[0]

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` as it is held until the end."""
        if self._folder is None:
            return tensor
        self._kept += 1
        return self.empty(f"{self._name}{self._kept}.healed", tensor.shape, tensor.dtype, tensor.device).copy_(tensor)
