"""The log of a recovery: a line for every judgement, as CSV or JSON, and for TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.staging import refuse_place
from moesurgeon.checkpoint.whole_file import refuse_file, write_whole
from moesurgeon.errors import OutputError, UsageError

SUFFIXES = (".csv", ".json")
Entry = Mapping[str, Any]


def check_log(path: Path | None, tensorboard: Path | None) -> None:
    """Raise UsageError or OutputError for a log that could not be written in the end."""
    if path is not None and path.suffix not in SUFFIXES:
        raise UsageError(f"--log {path} says no format; name it something{' or something'.join(SUFFIXES)}")
    if path is not None:
        refuse_file(path, "--log", overwrite=True)  # whether one may be replaced depends on what is gone on from
    if tensorboard is not None:
        _writer_class()
        refuse_place(tensorboard, "--tensorboard")


class Log:
    """Writes to ``path`` and to the folder ``tensorboard``, each if given."""

    def __init__(self, path: Path | None = None, tensorboard: Path | None = None) -> None:
        self._path, self._board = path, tensorboard
        self._shown = 0

    def write(self, entries: Sequence[Entry]) -> None:
        """Write all ``entries``; the file is there whole or as it was. Raises OutputError."""
        try:
            if self._path is not None:
                write_whole(self._path, _csv(entries) if self._path.suffix == ".csv" else _json(entries))
            if self._board is not None:
                self._show(entries)
        except OSError as error:
            raise OutputError(
                f"the log could not be written ({os.strerror(error.errno or 0)}): {self._path or self._board}"
            ) from error

    def _show(self, entries: Sequence[Entry]) -> None:
        writer = _writer_class()(log_dir=str(self._board))
        for entry in entries[self._shown :]:
            for name, value in flat(entry).items():
                if name != "step":
                    writer.add_scalar(name.replace(".", "/"), value, entry["step"])
        writer.close()
        self._shown = len(entries)


def flat(entry: Entry, prefix: str = "") -> dict[str, float]:
    """Return the numbers of an entry by dotted name; of lists their length.

    >>> flat({"step": 2, "usage": {"0": {"entropy": 0.5, "dead": [3, 4]}}})
    {'step': 2, 'usage.0.entropy': 0.5, 'usage.0.dead': 2}
    """
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = len(value) if isinstance(value, list) else value
    return found


def _csv(entries: Sequence[Entry]) -> str:
    rows = [flat(entry) for entry in entries]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["step"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(entries: Sequence[Entry]) -> str:
    return json.dumps(list(entries), indent=2) + "\n"


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs the package tensorboard: pip install 'moesurgeon[tensorboard]'"
        ) from error
    return SummaryWriter
