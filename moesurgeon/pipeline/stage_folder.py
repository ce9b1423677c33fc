"""What the stages of a cut leave on the disk: enough to go on after a kill, and to end up with the same.

    stages.json        which operation this is, as a digest of all that its result depends on
    journal.jsonl      a line for each stage that was judged, on the disk before the next one begins
    NAME/              of a stage that was accepted: stage.json (its choice) and healed.safetensors
    NAME.profile/      what the stage was chosen by; profile/ of the source

A stage's folder is put together as ``NAME.part`` and gets its name before its line is written. What has no line
was not judged, and is done again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moesurgeon.checkpoint.install import sync
from moesurgeon.checkpoint.whole_file import write_whole
from moesurgeon.errors import GateFailed, InputError, OutputError, UsageError
from moesurgeon.pipeline import journal
from moesurgeon.pipeline.healed_file import plan_from, save_healed
from moesurgeon.profiling.artefact import FACTS
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan

_OPERATION, _STAGE, _HEALED = "stages.json", "stage.json", "healed.safetensors"
_OWN = re.compile(r"((stage|count)-\d+(\.part|\.profile)?|profile)")  # nothing else in the folder is removed
Entry = Mapping[str, Any]


class StageFolder:
    """The folder of the stages of one operation; open it with :func:`stage_folder`."""

    def __init__(self, path: Path, entries: list[dict[str, Any]]) -> None:
        self.path = path
        self.entries = entries
        """The lines of stages that were judged before, oldest first."""

    def judged(self, name: str) -> dict[str, Any] | None:
        """Return the line of the stage ``name``, if it was judged before."""
        return next((entry for entry in self.entries if entry["stage"] == name), None)

    def accept(self, name: str, entry: Entry, kept: Mapping[int, tuple[int, ...]], how: Entry, plan: EditPlan) -> None:
        """Keep the stage ``name``: its choice ``kept``, ``how`` it was made, and what was healed in ``plan``."""
        part, folder = self.path / f"{name}.part", self.path / name
        part.mkdir()
        stage: dict[str, Any] = {"kept": {str(layer): experts for layer, experts in kept.items()}, "how": how}
        if plan.record and plan.record[-1]["operation"] == "heal":
            stage |= {"heal": plan.record[-1], "keys": save_healed(plan, part / _HEALED)}
        write_whole(part / _STAGE, json.dumps(stage, indent=2) + "\n")
        sync(part)
        part.rename(folder)
        sync(self.path)
        self._log(name, entry)

    def reject(self, name: str, entry: Entry) -> None:
        """Remember that the stage ``name`` was rolled back, and nothing else of it."""
        shutil.rmtree(self.path / f"{name}.profile", ignore_errors=True)
        self._log(name, entry)

    def forget(self, name: str) -> None:
        """Let go of what an accepted stage needs to be gone on from; its line stays."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def choice(self, name: str) -> tuple[dict[int, tuple[int, ...]], dict[str, Any]]:
        """Return the experts that the accepted stage ``name`` keeps, and how they were chosen."""
        stage = self._stage(name)
        return {int(layer): tuple(experts) for layer, experts in stage["kept"].items()}, stage["how"]

    def healed(self, name: str, anatomy: Anatomy) -> EditPlan | None:
        """Return the plan that heals ``anatomy``, what the cut of stage ``name`` results in; None if nothing does."""
        stage = self._stage(name)
        if "heal" not in stage:
            return None
        return plan_from(self.path / name / _HEALED, anatomy, stage["heal"], stage["keys"])

    def _stage(self, name: str) -> dict[str, Any]:
        try:
            stage: dict[str, Any] = json.loads((self.path / name / _STAGE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path / name} is damaged ({error}); remove {self.path} and begin anew") from error
        return stage

    def _log(self, name: str, entry: Entry) -> None:
        journal.append(self.path / journal.NAME, {"stage": name, **entry})
        self.entries.append({"stage": name, **entry})


@contextmanager
def stage_folder(path: Path, digest: str, *, stays: bool) -> Iterator[StageFolder]:
    """Make ``path``, or go on with the stages of the operation ``digest`` that are in it.

    It goes away once its result is written, or nothing is to be written, unless it ``stays``; after an error it is
    there for the next attempt. One that stays and is another operation's, or something else, is refused (UsageError).
    Raises OutputError for a disk that refuses or another process that is at it.
    """
    path = Path(os.path.abspath(path))
    _refuse_other(path, digest, clear=not stays)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"another moesurgeon works in {path}; wait for it or name another --run") from error
    except OSError as error:
        raise OutputError(
            f"{path} cannot hold the stages ({os.strerror(error.errno or 0)}); name another --run"
        ) from error
    try:
        if not (path / _OPERATION).exists():
            write_whole(path / _OPERATION, json.dumps({"digest": digest}) + "\n")
        found = _entries(path)
        _clear(path, {str(entry["stage"]) for entry in found})
        folder = StageFolder(path, found)
        yield folder
    except KeyboardInterrupt as error:
        if not folder.entries:
            _leave(path, stays)
            raise
        last = folder.entries[-1]["stage"]
        raise KeyboardInterrupt(f"interrupted; the same command goes on behind {last}") from error
    except OSError as error:
        raise OutputError(
            f"{path} could not be written ({os.strerror(error.errno or 0)}); free space and repeat the command, which "
            "goes on from the last stage"
        ) from error
    except GateFailed:
        _leave(path, stays)
        raise
    else:
        _leave(path, stays)
    finally:
        lock.release()


def _leave(path: Path, stays: bool) -> None:
    if not stays:
        shutil.rmtree(path, ignore_errors=True)


def _refuse_other(path: Path, digest: str, *, clear: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(each.name != ".lock" for each in path.iterdir())):
        return
    try:
        known = json.loads((path / _OPERATION).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a folder of stages; name another --run") from error
    if known == digest:
        return
    if clear:
        shutil.rmtree(path)
    else:
        raise UsageError(
            f"{path} holds stages of another operation (other options, checkpoint, text or version); remove it, or "
            "name another --run"
        )


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        found = journal.entries(path / journal.NAME)
        if all(isinstance(entry.get("stage"), str) and isinstance(entry.get("accepted"), bool) for entry in found):
            return found
        raise ValueError("a line is of no stage")
    except ValueError as error:
        raise InputError(f"{path / journal.NAME} is damaged ({error}); remove {path} and begin anew") from error


def _clear(path: Path, judged: set[str]) -> None:
    """Remove what a killed stage left."""
    for each in path.iterdir():
        if each.is_dir() and _OWN.fullmatch(each.name) and each.name not in judged and not (each / FACTS).is_file():
            shutil.rmtree(each)
