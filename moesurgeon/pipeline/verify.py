"""``verify``: is this checkpoint whole, and is what was kept still what the source holds?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesurgeon.checkpoint.hashes import hashes_of
from moesurgeon.checkpoint.header import StoredTensor
from moesurgeon.checkpoint.open import PROVENANCE_NAME
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.errors import InputError, OutputError
from moesurgeon.pipeline.known_text import counted
from moesurgeon.pipeline.provenance import Step, history_of, refuse_inconsistent, refuse_other_hashes
from moesurgeon.pipeline.subject import Subject, first_of, open_subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.edits import Output, Part, Slice
from moesurgeon.surgery.readback import same_specs
from moesurgeon.surgery.replay import NotRecorded, replay
from moesurgeon.surgery.shards import bytes_of

_STEP = 64 << 20


def verify(name: str, source: str | None = None, progress: Progress = SILENT, *, full: bool = False) -> dict[str, Any]:
    """Check ``name`` for completeness and, given its ``source``, every kept tensor byte by byte.

    ``full``: also read every byte and report the hash of each tensor. Raises OutputError with the first
    problem; the report of a checkpoint that verified otherwise.
    """
    subject = open_subject(name, complete=False)
    if subject.problems:
        raise OutputError(f"{name} does not verify: {first_of(subject.problems)}")
    warnings = [*subject.warnings, *_unchecked(subject)]
    if full:
        warnings += subject.odd_routers
    for warning in warnings:
        progress.note(f"warning: {warning}")
    history = history_of(subject)
    report: dict[str, Any] = {
        "checkpoint": name,
        "tensors": len(subject.checkpoint.tensors),
        "bytes": subject.checkpoint.nbytes,
        "fingerprint": subject.fingerprint,
        "warnings": warnings,
        "history": [[counted(each) for each in step["operations"]] for step in history],
    }
    if source is not None:
        report["source"] = source
        report |= _against_source(subject, open_subject(source), history, progress)
    refuse_inconsistent(subject, history)
    if full:
        not_finite: dict[str, int] = {}
        with progress.task("hashing", subject.checkpoint.nbytes, "bytes") as advance:
            hashes = hashes_of(subject.checkpoint, advance, not_finite)
        _refuse_not_finite(name, not_finite)
        report |= {"hashes_compared": refuse_other_hashes(subject, history, hashes), "hashes": hashes}
    return report


def _refuse_not_finite(name: str, counts: Mapping[str, int]) -> None:
    if counts:
        first, count = next(iter(counts.items()))
        more = f" (and so do {len(counts) - 1} tensors more)" if len(counts) > 1 else ""
        raise OutputError(
            f"{name} does not verify: {first} holds {count} values that are NaN or infinite{more}; make it again"
        )


def _unchecked(subject: Subject) -> list[str]:
    family = subject.anatomy.family
    if family.parts is not None:
        return []
    return [
        f"{family.title}: what layers hold besides experts is compared across layers only, moesurgeon has no full list"
    ]


def _against_source(subject: Subject, source: Subject, history: Sequence[Step], progress: Progress) -> dict[str, Any]:
    """Replay the recorded operations on ``source`` and compare the bytes of all that was kept."""
    if not history:
        raise InputError(f"{subject.name} has no {PROVENANCE_NAME}: there is no record of a source to compare with")
    fingerprints = [step["source"].get("fingerprint") for step in history]
    if source.fingerprint not in fingerprints:
        raise InputError(f"{subject.name} was not made from {source.name}: its record names other fingerprints")
    steps = history[fingerprints.index(source.fingerprint) :]
    plan = replay(source.anatomy, [operation for step in steps for operation in step["operations"]])
    if not same_specs(subject.anatomy.tensors, {name: output.spec for name, output in plan.outputs.items()}):
        raise OutputError(f"{subject.name} holds other tensors than its record makes of {source.name}")
    for file, content in plan.files.items():
        path = subject.root / file
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != content:
            raise OutputError(f"{subject.name} does not verify: {file} is not what its record says; write it again")
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
    # After the tensors: of a config that somebody edited one wants to know that nothing else was.
    if keys := _other_keys(subject.anatomy.config, plan.edited_config(source.anatomy.config)):
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        raise OutputError(
            f"{subject.name} does not verify: there is another {', '.join(keys[:8])}{more} in config.json than its "
            f"record makes of {source.name}; all its tensors are as recorded, so put back what config.json said"
        )
    return {"tensors_equal": compared, "tensors_replaced": replaced, "tensors_dropped": len(plan.dropped)}


def _other_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the keys that only one of two configs has, or that have other values."""
    return [key for key in sorted({*one, *other}) if (key in one, one.get(key)) != (key in other, other.get(key))]


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
