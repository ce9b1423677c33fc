"""``verify``: is this checkpoint whole, and is what was kept still what the source holds?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesurgeon.checkpoint.open import PROVENANCE_NAME, read_json_file
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.errors import CheckpointError, InputError, OutputError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.completeness import problems_of
from moesurgeon.surgery.edits import Output, Slice
from moesurgeon.surgery.replay import replay
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
    if not isinstance(history, list) or not all(isinstance(step, dict) and "operations" in step for step in history):
        raise CheckpointError(f"{PROVENANCE_NAME} holds no history; it was changed by hand or belongs elsewhere")
    return history


def _against_source(subject: Subject, source: Subject, progress: Progress) -> dict[str, Any]:
    """Replay the recorded operations on ``source`` and compare the bytes of all that was kept."""
    history = _history(subject)
    if not history:
        raise InputError(f"{subject.name} has no {PROVENANCE_NAME}: there is no record of a source to compare with")
    fingerprints = [(step.get("source") or {}).get("fingerprint") for step in history]
    if source.fingerprint not in fingerprints:
        raise InputError(f"{subject.name} was not made from {source.name}: its record names other fingerprints")
    steps = history[fingerprints.index(source.fingerprint) :]
    plan = replay(source.anatomy, [operation for step in steps for operation in step["operations"]])
    specs = {name: (spec.dtype, spec.shape) for name, spec in subject.anatomy.tensors.items()}
    if specs != {name: (output.spec.dtype, output.spec.shape) for name, output in plan.outputs.items()}:
        raise OutputError(f"{subject.name} holds other tensors than its record makes of {source.name}")
    compared = replaced = 0
    with (
        ShardReader(subject.checkpoint) as mine,
        ShardReader(source.checkpoint) as theirs,
        progress.task("comparing", plan.nbytes, "bytes") as advance,
    ):
        for name, output in plan.outputs.items():
            if output.verb == "replace":
                replaced += 1
            elif _same_bytes(output, subject, mine, source, theirs):
                compared += 1
            else:
                raise OutputError(f"{subject.name} does not verify: {name} differs from {source.name}")
            advance(output.spec.nbytes)
    return {"tensors_equal": compared, "tensors_replaced": replaced, "tensors_dropped": len(plan.dropped)}


def _same_bytes(output: Output, subject: Subject, mine: ShardReader, source: Subject, theirs: ShardReader) -> bool:
    tensor = subject.checkpoint.tensors[output.spec.name]
    position = 0
    for part in output.parts:
        if isinstance(part, Slice):
            stored = source.checkpoint.tensors[part.tensor]
            for start in range(part.start, part.stop, _STEP):
                stop = min(start + _STEP, part.stop)
                there = position + start - part.start
                if mine.read(tensor, there, there + stop - start) != theirs.read(stored, start, stop):
                    return False
        elif mine.read(tensor, position, position + part.length) != bytes_of(part, source.checkpoint, theirs):
            return False
        position += part.length
    return True
