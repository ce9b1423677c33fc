"""The end of a run: which state it comes to, and under which names the checkpoints lie in its folder.

    checkpoint/     the last state that was accepted; not there if that is the original
    rejected/       the last state, if the recipe's gate failed on it
    stages/         the states before

Until a state is accepted it lies under ``stages/``, so that a run that was killed, too, leaves nothing called
``checkpoint``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.install import sync
from moesurgeon.errors import OutputError

_ACCEPTED, _REJECTED = "checkpoint", "rejected"


def settle(folder: Path, stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Give the last of ``stages`` and the last accepted one their names in ``folder``; return what figures say of it.

    The first stage is the original, which is always accepted and stays where it is. The others lie in ``folder``.
    """
    number = max(number for number, stage in enumerate(stages) if stage["accepted"])
    rejected = None
    with writing(folder):
        if not stages[-1]["accepted"]:
            rejected = stages[-1]["checkpoint"] = _renamed(Path(stages[-1]["checkpoint"]), folder / _REJECTED)
        if number:
            stages[number]["checkpoint"] = _renamed(Path(stages[number]["checkpoint"]), folder / _ACCEPTED)
    return {
        "checkpoint": stages[number]["checkpoint"],
        "accepted": stages[number]["stage"],
        **({"rejected": rejected} if rejected else {}),
    }


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise OutputError where the journal, the figures or a name cannot be written; the stages before are whole."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} could not be written ({error.strerror}); what its journal names is whole: free space, or choose "
            "another disk"
        ) from error


def _renamed(path: Path, name: Path) -> str:
    if path.exists() or not name.exists():  # else a run that was stopped here has done it
        path.rename(name)
    sync(name.parent)
    return str(name)
