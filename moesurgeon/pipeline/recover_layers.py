"""``recover`` with its first half: every layer healed towards the teacher, then what is left trained end to end.

The healed state is a checkpoint of its own, ``.NAME.layers`` beside the output, until there is a result: a run that was
killed goes on from it, and the training may read it layer by layer. Shards that healing left alone are hard links.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moesurgeon import launched
from moesurgeon.checkpoint.whole_file import write_whole
from moesurgeon.errors import InputError, NothingToDo, OutputError, UsageError
from moesurgeon.pipeline.heal import healed
from moesurgeon.pipeline.healing_text import planned
from moesurgeon.pipeline.options import HealSpec, Running, Text, Writing
from moesurgeon.pipeline.provenance import refuse_stale_record
from moesurgeon.pipeline.recover import RecoverSpec, digest_of, recover, refuse_spec
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.tokenizers import refuse_other_tokenizer
from moesurgeon.pipeline.write import finish, refuse_layout, refuse_output
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.plan import identity


def recover_layers(
    source: str,
    spec: RecoverSpec,
    heal: HealSpec,
    text: Text,
    running: Running,
    writing: Writing,
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Heal the layers of ``source`` as ``heal`` says, with the teacher and the text of the training, then train.

    Of ``heal`` method, amounts and pace count. Without steps in the schedule the healed state is the result.
    ``healing`` and ``healed`` of the report are those of a cut that is healed. Raises what ``recover`` raises, and
    UsageError for what only the second half can do.
    """
    text_split = text.split if text.split in ("train", "calibration") else None
    heal = replace(
        heal,
        traces=text.traces,
        teacher=spec.teacher,
        length=text.length,
        split=text_split,
        sample=text.sample,
        validation=spec.validation,
    )
    subject, teacher = open_subject(source), open_subject(spec.teacher)
    refuse_stale_record(subject)
    refuse_output(writing, subject.root, teacher.root)
    refuse_other_tokenizer(subject, teacher)
    _refuse(subject, teacher, spec, text, writing)
    if not spec.schedule.steps:
        return _layers_alone(subject, heal, running, writing, progress)
    if writing.dry_run:
        return {**recover(source, spec, text, running, writing, progress), "healed": {"planned": asdict(heal)}}
    folder = writing.output.absolute().with_name(f".{writing.output.name}.layers")
    _refuse_strange(folder)
    with _kept_only_if_killed(folder):
        report = _healed_in(folder, subject, teacher, heal, running, progress)
        start, kept = (str(folder / "model"), True) if report["healed"]["kept"] else (source, writing.allow_noop)
        # What the layers gave is a result, whether or not the training adds to it.
        found = recover(start, spec, text, running, replace(writing, allow_noop=kept), progress)
    return {**found, "source": source, **report}


def _refuse(subject: Subject, teacher: Subject, spec: RecoverSpec, text: Text, writing: Writing) -> None:
    if launched.size() > 1:
        raise UsageError("layers are healed by one process: run recover --heal-method --steps 0 first, then the rest")
    if spec.save_adapter is not None:
        raise UsageError(
            "--save-adapter is for the checkpoint that is trained, which --heal-method makes on the way: heal with "
            "--steps 0 first"
        )
    if subject.fingerprint == teacher.fingerprint:
        raise UsageError(
            f"{subject.name} is its own teacher, so there is nothing to heal; give the checkpoint before the surgery"
        )
    if spec.schedule.steps:
        refuse_spec(subject, teacher, spec, text, writing)


def _refuse_strange(folder: Path) -> None:
    """Raise UsageError if ``folder``, which will be removed, holds what was not put there on the way."""
    mine = ("healing.json", "model")
    if folder.is_dir() and any(path.name not in mine and not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} is where the healed layers go, and holds something else; move it away")


def _layers_alone(
    subject: Subject, heal: HealSpec, running: Running, writing: Writing, progress: Progress
) -> dict[str, Any]:
    plan = identity(subject.anatomy)
    refuse_layout(plan, subject, writing)
    if writing.dry_run:
        found = planned(subject, heal, progress)
        return {"healing": [], "healed": found, "dry_run": True, "output": str(writing.output)}
    with healed(plan, subject, heal, running, progress) as (better, report):
        if not report["kept"] and not writing.allow_noop:
            raise NothingToDo(
                f"healing lowered no held-out loss (it is {report['heldout']['bare']:.4f}, the teacher's "
                f"{report['heldout']['teacher']:.4f}); nothing was written: give more text, or --allow-noop"
            )
        layers = report.pop("layers")
        return {"healing": layers, "healed": report, **finish(better, subject, writing, progress)}


def _healed_in(
    folder: Path, subject: Subject, teacher: Subject, heal: HealSpec, running: Running, progress: Progress
) -> dict[str, Any]:
    """Write the healed checkpoint to ``folder``, unless it is there; return ``healing`` and ``healed``."""
    facts = [asdict(heal), teacher.fingerprint, running.device, running.dtype]
    digest, record = digest_of(subject, facts), folder / "healing.json"
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["digest"] == digest:
            progress.note("note: the layers were healed by the run before; going on from there")
            return dict(known["report"])
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} could not be made ({error.strerror}); choose another output") from error
    with healed(identity(subject.anatomy), subject, heal, running, progress) as (plan, report):
        if report["kept"]:
            finish(plan, subject, Writing(output=folder / "model", link=True, overwrite=True), progress)
    found = {"healing": report.pop("layers"), "healed": report}
    try:
        write_whole(record, json.dumps({"digest": digest, "report": found}))
    except OSError as error:
        raise OutputError(f"{record} could not be written ({error.strerror}); choose another disk") from error
    return found


@contextmanager
def _kept_only_if_killed(folder: Path) -> Iterator[None]:
    try:
        yield
    except (UsageError, InputError):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
