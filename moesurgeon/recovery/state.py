"""What a recovery that is killed goes on from: one file, replaced as a whole after every judgement."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from moesurgeon.checkpoint.install import sync
from moesurgeon.engine.ranks import Ranks
from moesurgeon.errors import OutputError

_STATE = "state.pt"


class Store:
    """The folder of one recovery, made when there is something to keep. ``digest`` names all the result depends on.

    Of several ``ranks`` all read and the first writes.
    """

    def __init__(self, folder: Path, digest: str, ranks: Ranks | None = None) -> None:
        self.folder = folder
        self._digest, self._ranks = digest, ranks or Ranks()

    def load(self) -> dict[str, Any] | None:
        """Do what :meth:`read` does, on all ranks together; OutputError if they do not see the same."""
        state = self.read()
        if not self._ranks.agrees(state["step"] if state else 0):
            raise OutputError(
                f"the processes do not find the same in {self.folder}; put the output where all of them can read it"
            )
        return state

    def read(self) -> dict[str, Any] | None:
        """Return what was saved last; None if there is nothing, or something of another recovery, or damage."""
        try:
            state: dict[str, Any] = torch.load(self.folder / _STATE, map_location="cpu", weights_only=True)
            return state if state["digest"] == self._digest else None
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
            return None

    def save(self, state: dict[str, Any]) -> None:
        """Put ``state`` (tensors, numbers and texts in dicts and lists) on the disk; OutputError if it refuses."""
        if not self._ranks.is_first:
            return
        part = self.folder / f"{_STATE}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "digest": self._digest}, part)
            sync(part)
            part.rename(self.folder / _STATE)
            sync(self.folder)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError for a full disk
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error).splitlines()[0]
            part.unlink(missing_ok=True)
            raise OutputError(
                f"{self.folder} cannot hold what a killed recovery goes on from ({reason}); free space and repeat the "
                "command"
            ) from error

    def remove(self) -> None:
        """Forget everything: the result is written, or there is none."""
        if self._ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)
