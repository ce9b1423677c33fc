"""``verify``: is this checkpoint whole, and is what was kept still what the source holds?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesurgeon.checkpoint.header import StoredTensor
from moesurgeon.checkpoint.open import PROVENANCE_NAME, read_json_file
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.errors import CheckpointError, InputError, OutputError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.completeness import problems_of
from moesurgeon.surgery.edits import Output, Part, Slice
from moesurgeon.surgery.replay import NotRecorded, replay
from moesurgeon.surgery.shards import bytes_of

_STEP = 64 << 20


def verify(name: str, source: str | None = None, progress: Progress = SILENT) -> dict[str, Any]:
    """Check ``name`` for completeness and, given its ``source``, every kept tensor byte by byte.

    Raises OutputError with the first problem; the report of a checkpoint that verified otherwise.
    """
    subject = open_subject(name, complete=False)
    problems = problems_of(subject.anatomy)
    if problems:
        more = f" (and {len(problems) - 1} more: see moesurgeon inspect)" if len(problems) > 1 else ""
        raise OutputError(f"{name} does not verify: {problems[0]}{more}")
    report: dict[str, Any] = {
        "checkpoint": name,
        "tensors": len(subject.checkpoint.tensors),
        "bytes": subject.checkpoint.nbytes,
        "fingerprint": subject.fingerprint,
        "history": [step["operations"] for step in _history(subject)],
    }
    if source is not None:
        report["source"] = source
        report |= _against_source(subject, open_subject(source), progress)
    return report


def _history(subject: Subject) -> Sequence[Mapping[str, Any]]:
    """Return the steps that ``moesurgeon.json`` records; none if the checkpoint was never edited."""
    if not (subject.root / PROVENANCE_NAME).exists():
        return []
    history = read_json_file(subject.root, PROVENANCE_NAME).get("history")
    if not isinstance(history, list) or not all(
        isinstance(step, dict) and isinstance(step.get("source"), dict) and isinstance(step.get("operations"), list)
        for step in history
    ):
        raise CheckpointError(f"{PROVENANCE_NAME} holds no history; it was changed by hand or belongs elsewhere")
    return history


def _against_source(subject: Subject, source: Subject, progress: Progress) -> dict[str, Any]:
    """Replay the recorded operations on ``source`` and compare the bytes of all that was kept."""
    history = _history(subject)
    if not history:
        raise InputError(f"{subject.name} has no {PROVENANCE_NAME}: there is no record of a source to compare with")
    fingerprints = [step["source"].get("fingerprint") for step in history]
    if source.fingerprint not in fingerprints:
        raise InputError(f"{subject.name} was not made from {source.name}: its record names other fingerprints")
    steps = history[fingerprints.index(source.fingerprint) :]
    plan = replay(source.anatomy, [operation for step in steps for operation in step["operations"]])
    specs = {name: (spec.dtype, spec.shape) for name, spec in subject.anatomy.tensors.items()}
    if specs != {name: (output.spec.dtype, output.spec.shape) for name, output in plan.outputs.items()}:
        raise OutputError(f"{subject.name} holds other tensors than its record makes of {source.name}")
    mine_says, record_says = dict(subject.anatomy.config), plan.edited_config(source.anatomy.config)
    for key in sorted(mine_says.keys() | record_says.keys()):
        if (key in mine_says, mine_says.get(key)) != (key in record_says, record_says.get(key)):
            raise OutputError(f"{subject.name} has another {key} in config.json than its record makes of {source.name}")
    compared = replaced = 0
    with (
        ShardReader(subject.checkpoint) as mine,
        ShardReader(source.checkpoint) as theirs,
        progress.task("comparing", plan.nbytes, "bytes") as advance,
    ):
        for output in plan.outputs.values():
            if _is_recorded(output, subject, mine, source, theirs):
                compared += 1
            else:
                replaced += 1
            advance(output.spec.nbytes)
    return {"tensors_equal": compared, "tensors_replaced": replaced, "tensors_dropped": len(plan.dropped)}


def _is_recorded(output: Output, subject: Subject, mine: ShardReader, source: Subject, theirs: ShardReader) -> bool:
    """Compare what the record tells of a tensor's bytes, and return whether it tells of all of them.

    Raises OutputError if they differ.
    """
    tensor = subject.checkpoint.tensors[output.spec.name]
    position, complete = 0, True
    for part in output.parts:
        try:
            same = _same_bytes(part, tensor, position, mine, source, theirs)
        except NotRecorded:
            same, complete = True, False
        if not same:
            raise OutputError(f"{subject.name} does not verify: {output.spec.name} differs from {source.name}")
        position += part.length
    return complete


def _same_bytes(
    part: Part, tensor: StoredTensor, position: int, mine: ShardReader, source: Subject, theirs: ShardReader
) -> bool:
    """Tell whether the bytes of ``tensor`` from ``position`` on are those of ``part``."""
    if not isinstance(part, Slice):
        return mine.read(tensor, position, position + part.length) == bytes_of(part, source.checkpoint, theirs)
    stored = source.checkpoint.tensors[part.tensor]
    return all(
        mine.read(tensor, position + start, position + min(start + _STEP, part.length))
        == theirs.read(stored, part.start + start, part.start + min(start + _STEP, part.length))
        for start in range(0, part.length, _STEP)
    )
