"""What ``moesurgeon.json`` says of a checkpoint, and whether the checkpoint is still that one.

The file is untrusted: it may be missing, damaged, or belong to another checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from moesurgeon.checkpoint.open import PROVENANCE_NAME, read_json_file
from moesurgeon.errors import CheckpointError, OutputError
from moesurgeon.families.keys import MAX_COUNT
from moesurgeon.pipeline.subject import Subject
from moesurgeon.surgery.counts import expert_counts, top_k_counts
from moesurgeon.surgery.expert_rules import still_numbered
from moesurgeon.surgery.numbering import new_numbers

Step = Mapping[str, Any]


def history_of(subject: Subject) -> Sequence[Step]:
    """Return the steps that ``moesurgeon.json`` records; none if the checkpoint was never edited."""
    if not (subject.root / PROVENANCE_NAME).exists():
        return []
    history = read_json_file(subject.root, PROVENANCE_NAME).get("history")
    if not isinstance(history, list) or not all(
        isinstance(step, dict)
        and isinstance(step.get("source"), dict)
        and isinstance(step.get("result", {}), dict)
        and isinstance(step.get("operations"), list)
        for step in history
    ):
        raise CheckpointError(f"{PROVENANCE_NAME} holds no history; it was changed by hand or belongs elsewhere")
    return history


def refuse_stale_record(subject: Subject) -> None:
    """Raise CheckpointError if the record is of another checkpoint: an edit would carry it on and never verify."""
    history = history_of(subject)
    result = history[-1].get("result", {}) if history else {}
    if result.get("fingerprint") not in (None, subject.fingerprint):
        raise CheckpointError(
            f"{subject.name} is not what its {PROVENANCE_NAME} records, so that no edit of it would verify: restore "
            f"its files, or remove {PROVENANCE_NAME} if the change is meant"
        )


def refuse_inconsistent(subject: Subject, history: Sequence[Step]) -> None:
    """Raise OutputError unless each step begins with what the one before it made, and the last made ``subject``.

    Fingerprints cover the config and samples of every tensor; records of earlier versions lack the
    result's, so that the counts in the operations are held against the config as well.
    """
    for before, after in itertools.pairwise(history):
        made = before.get("result", {}).get("fingerprint")
        if made is not None and made != after["source"].get("fingerprint"):
            raise OutputError(
                f"{subject.name} does not verify: the steps in {PROVENANCE_NAME} do not follow each other"
            )
    operations = [operation for step in history for operation in step["operations"] if isinstance(operation, dict)]
    for verb, what, now in (
        ("retop", "top_k", subject.anatomy.top_k),
        ("prune", "experts", subject.anatomy.experts),
    ):
        recorded = [operation.get(what) for operation in operations if operation.get("operation") == verb]
        if recorded and isinstance(recorded[-1], dict) and recorded[-1].get("after") != now:
            raise OutputError(
                f"{subject.name} does not verify: {PROVENANCE_NAME} ends with {what} {recorded[-1].get('after')!r}, "
                f"config.json says {now}"
            )
    for operation in operations:
        counts = operation.get("experts")
        count = counts.get("before") if isinstance(counts, dict) else None
        if type(count) is int and count > subject.anatomy.experts:
            for name in subject.anatomy.left_uncut(count):
                raise OutputError(
                    f"{subject.name} does not verify: {name} has shape {list(subject.anatomy.tensors[name].shape)}, so "
                    f"it may still count the {count} experts of before; prune the source again"
                )
    if any(operation.get("operation") in ("prune", "retop") for operation in operations):
        try:
            expert_counts(subject.anatomy), top_k_counts(subject.anatomy)
        except CheckpointError as error:
            raise OutputError(f"{subject.name} does not verify: {error}") from error
    _refuse_renumbered(subject, operations)
    result = history[-1].get("result", {}) if history else {}
    if result.get("fingerprint") not in (None, subject.fingerprint):
        raise OutputError(f"{subject.name} does not verify: {_what_changed(subject, result)}")


def _refuse_renumbered(subject: Subject, operations: Sequence[Mapping[str, Any]]) -> None:
    """Raise OutputError where rules that name experts still count them as before ``operations``."""
    prunes = [operation.get("experts") for operation in operations if operation.get("operation") == "prune"]
    before = prunes[0].get("before") if prunes and isinstance(prunes[0], dict) else None
    if type(before) is not int or not 0 < before <= MAX_COUNT:
        return
    try:
        numbers = new_numbers(operations, subject.anatomy.routed_layers, before)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{PROVENANCE_NAME} has a map of experts that is none; it was changed by hand") from error
    if numbers is not None and (line := still_numbered(subject.anatomy, before, numbers, subject.root)):
        raise OutputError(f"{subject.name} does not verify: {line}; prune the source again")


def _what_changed(subject: Subject, result: Mapping[str, Any]) -> str:
    """Say which half of ``subject`` is not what the record's ``result`` has the hash of; earlier records have none."""
    after = f"after {PROVENANCE_NAME} was written"
    if "config" not in result or "tensors" not in result:
        return f"config.json or a tensor was changed {after}; verify --source tells which"
    if result["tensors"] != subject.identity.tensors:
        also = " and config.json" if result["config"] != subject.identity.config else ""
        return f"a tensor{also} was changed {after}; verify --source tells which, or write it again"
    return (
        f"config.json was changed {after}, the tensors were not; restore it (verify --source names the keys), "
        "or take this as proof of the tensors alone"
    )


def refuse_other_hashes(subject: Subject, history: Sequence[Step], hashes: Mapping[str, str]) -> int:
    """Return how many of ``hashes`` the last step of the record holds as well; OutputError if one differs."""
    recorded = history[-1].get("result", {}).get("hashes", {}) if history else {}
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{PROVENANCE_NAME} holds hashes that are no map of tensors; it was changed by hand")
    for name, recorded_hash in recorded.items():
        if hashes.get(name) != recorded_hash:
            raise OutputError(f"{subject.name} does not verify: {name!r} is not what {PROVENANCE_NAME} has the hash of")
    return len(recorded)
