"""Healed tensors on disk while the walk goes on: those of a whole model may be larger than memory."""

from __future__ import annotations

from pathlib import Path

import torch

from moesurgeon.errors import OutputError


class Spill:
    """Keeps tensors in files of ``folder``, mapped; None: in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._count = 0

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor``, from now on in a file that is mapped."""
        if self._folder is None:
            return tensor
        path = self._folder / f"{self._count}.healed"
        self._count += 1
        try:
            mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            raise OutputError(f"healed tensors cannot be held in {path} ({reason}); point TMPDIR elsewhere") from error
        return mapped.view(tensor.shape).copy_(tensor)
