"""What a long walk leaves behind after every layer, so that a killed one goes on and ends up with the same.

A folder with the hidden states in two files that take turns (``walk.hidden``), the sums so far, and a small
file that says after how many layers they were taken, of which checkpoint and which text. With several ranks
each has its own; none begins to write a layer's states before all have saved the one before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from moesurgeon.checkpoint.install import sync
from moesurgeon.engine.ranks import Array, Ranks
from moesurgeon.engine.walk import Walk
from moesurgeon.errors import OutputError

_STATE = "state.json"


class WalkState:
    """The state in ``folder``, which is made if need be; one of another ``digest`` is cleared away.

    ``digest`` names everything that the result depends on.
    """

    def __init__(self, folder: Path, digest: str, ranks: Ranks | None = None) -> None:
        ranks = ranks or Ranks()
        self.folder = folder / f"{ranks.number}-of-{ranks.size}"
        self._digest = digest
        self._done = self._read()
        if self._done == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unkept(self.folder, error) from error

    def resumed(self, walk: Walk, sums: Mapping[str, Array], ranks: Ranks) -> int:
        """Return after how many layers ``walk`` goes on, with the ``sums`` of those filled in; 0: from the start.

        Ranks can be one layer apart; all go on from the one that every rank has.
        """
        from safetensors.numpy import load_file

        done = ranks.least(self._done)
        if not ranks.least(done > 0 and self._sums(done).is_file()):
            (self.folder / _STATE).unlink(missing_ok=True)  # what it speaks of is written over now
            return 0
        for name, array in load_file(self._sums(done)).items():
            sums[name][:] = array
        for hidden in walk.hidden.values():
            hidden.turn_to(done)
        return done

    def save(self, walk: Walk, done: int, sums: Mapping[str, Array], ranks: Ranks) -> None:
        """Keep what there is after ``done`` layers."""
        from safetensors.numpy import save

        for hidden in walk.hidden.values():
            hidden.turn_to(done)
        part = self.folder / ".part"
        try:
            for path in self.folder.glob("*.hidden*"):
                sync(path)
            for content, name in (
                (save(dict(sums)), self._sums(done)),
                (json.dumps({"digest": self._digest, "done": done}).encode(), self.folder / _STATE),
            ):
                part.write_bytes(content)
                sync(part)
                part.rename(name)
            self._sums(done - 2).unlink(missing_ok=True)  # the last two stay, for a rank that is behind
        except OSError as error:
            part.unlink(missing_ok=True)
            raise _unkept(self.folder, error) from error
        ranks.least(done)  # wait for all

    def _sums(self, done: int) -> Path:
        return self.folder / f"{done}.safetensors"

    def _read(self) -> int:
        """Return how many layers the state covers; 0 if there is none that can be gone on from."""
        try:
            said = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            done = said["done"] if said["digest"] == self._digest else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return done if type(done) is int and done > 0 and self._sums(done).is_file() else 0


def _unkept(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"what a killed run needs cannot be kept in {folder} ({error.strerror}); or use --no-resume")
