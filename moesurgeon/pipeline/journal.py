"""A journal: one JSON object a line, each on the disk before the next thing is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add ``entry`` and have it on the disk; a line that a kill left unfinished is taken away first."""
    finished = _finished(path)
    with path.open("r+b" if path.exists() else "wb") as journal:
        journal.truncate(finished)
        journal.seek(finished)
        journal.write(json.dumps(entry).encode() + b"\n")
        journal.flush()
        os.fsync(journal.fileno())


def entries(path: Path) -> list[dict[str, Any]]:
    """Return what the journal holds; ValueError for lines that are no JSON objects."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_bytes()[: _finished(path)].splitlines()]
    if not all(isinstance(entry, dict) for entry in found):
        raise ValueError("a line is no object")
    return found


def _finished(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
