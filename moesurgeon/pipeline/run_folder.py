"""The folder of a run: what may be in it, and how an earlier run makes way for a new one."""

from __future__ import annotations

import shutil
from pathlib import Path

from moesurgeon.checkpoint.replaceable import ANYTHING, CHECKPOINT, Contents, Kind, refuse_strange
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.journal import NAME as JOURNAL
from moesurgeon.pipeline.run_past import FIGURES, NAME
from moesurgeon.profiling.artefact import PROFILE

_WORKING = {".*.moesurgeon": (ANYTHING,), ".*.walk": (ANYTHING,), ".*.recover": (ANYTHING,),
            ".*.layers": (ANYTHING,), ".*.stages": (ANYTHING,)}  # fmt: skip
"""What a killed step leaves beside its output."""
_STEPS = Contents(
    files=("[0-9]*.jsonl", ".*.part", ".*.lock"),
    folders={**_WORKING, "[0-9]*": (CHECKPOINT.contents, PROFILE.contents)},
)
_USAGE = Contents(files=(".*.lock",), folders={**_WORKING, "[0-9]*": (PROFILE.contents,)})
RUN = Kind(
    "the folder of a run",
    JOURNAL,
    (),
    Contents(
        files=(JOURNAL, NAME, FIGURES, "report.html", ".*.part"),
        folders={
            "stages": (_STEPS,),
            "usage": (_USAGE,),
            "checkpoint": (CHECKPOINT.contents,),
            "rejected": (CHECKPOINT.contents,),
        },
    ),
    has=("stages",),
)


def make_way(folder: Path, *, overwrite: bool) -> Path:
    """Make the run folder; return where an earlier run waits until this one is complete.

    Only the folder of a run with nothing else in it is ever replaced, and only on request. Where this run fails, the
    earlier one is kept beside it as ``NAME.previous``.
    """
    previous = previous_of(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not folder.is_dir() or not RUN.is_kind_of(folder):
            raise UsageError(f"{folder} exists and is not the folder of a run; choose another")
        if not overwrite:
            refuse_finished(folder)
            raise UsageError(
                f"{folder} holds a run that was begun with another recipe, checkpoint, text or version; choose another "
                "folder or add --overwrite"
            )
        refuse_strange(folder, RUN)
        if previous.exists():  # then what is in the folder failed
            refuse_strange(previous, RUN)
            shutil.rmtree(folder)
        else:
            folder.rename(previous)
    (folder / "stages").mkdir(parents=True)
    (folder / JOURNAL).touch()
    return previous


def refuse_finished(folder: Path) -> None:
    """Raise UsageError if ``folder`` holds a run that has ended."""
    if folder.is_dir() and RUN.is_kind_of(folder) and (folder / FIGURES).exists():
        raise UsageError(f"{folder} holds a run already; choose another folder or add --overwrite")


def previous_of(folder: Path) -> Path:
    """Return where the run that was in ``folder`` before waits."""
    return folder.with_name(f"{folder.name}.previous")


def remove_previous(previous: Path) -> None:
    """Remove the earlier run once the new one is complete; what was put into its folder meanwhile keeps it there."""
    if previous.is_dir() and RUN.is_kind_of(previous) and not RUN.contents.strangers(previous):
        shutil.rmtree(previous)
