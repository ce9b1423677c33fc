"""Which text a checkpoint was fitted on and judged by, as ``moesurgeon.json`` has it: written by what fits, read by
what measures or fits again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesurgeon.checkpoint.open import PROVENANCE_NAME
from moesurgeon.errors import CheckpointError, TraceError
from moesurgeon.pipeline.provenance import history_of
from moesurgeon.pipeline.subject import Subject
from moesurgeon.traces.document_hashes import LETTERS, MOST, Hashes, documents_of, packed, unpacked, windows_in
from moesurgeon.traces.windows import Corpus

# By which key of an operation's record its documents are known, and by which its text is as a whole.
_RECORDS = (("documents", "traces"), ("choice_documents", "choice_traces"))
_FITTING = ("heal", "recover", "prune")
UNUSED = "unused_documents"
"""Key of a cut's record for the documents of a healing that was left out, since it did not lower the loss."""


@dataclass(frozen=True)
class KnownText:
    """What calibrated and what judged (validation) a checkpoint, over its whole history, by document.

    ``tried``: what a healing read of which nothing came. ``whole``: of steps that do not name their documents the
    sha256 of the text of each domain that calibrated.
    ``is_partial``: a step had more documents than a record names.
    """

    calibrated: Hashes = frozenset()
    judged: Hashes = frozenset()
    tried: Hashes = frozenset()
    whole: Hashes = frozenset()
    is_partial: bool = False


def record_of(calibration: Corpus, validation: Corpus) -> dict[str, Any]:
    """Return what a record says of the documents that fit and that judge."""
    found = {"calibration": documents_of(calibration), "validation": documents_of(validation)}
    unnamed = sum(max(0, len(hashes) - MOST) for hashes in found.values())
    return {**{role: packed(hashes) for role, hashes in found.items()}, **({"unnamed": unnamed} if unnamed else {})}


def counted(operation: Any) -> Any:
    """Return an operation's record with the number of its documents in place of their hashes, for a report."""
    if not isinstance(operation, Mapping):
        return operation
    found = dict(operation)
    for name in (UNUSED, *(documents for documents, _ in _RECORDS)):
        if isinstance(record := found.get(name), Mapping):
            found[name] = {
                role: len(hashes) // LETTERS if isinstance(hashes, str) else hashes for role, hashes in record.items()
            }
    return found


def known_text(subject: Subject) -> KnownText:
    """Return what is known of the text of ``subject``; CheckpointError for a record that cannot be read."""
    calibrated: set[str] = set()
    judged: set[str] = set()
    tried: set[str] = set()
    whole: set[str] = set()
    is_partial = False
    for step in history_of(subject):
        for operation in step["operations"]:
            if not isinstance(operation, Mapping):
                continue
            if UNUSED in operation:
                tried |= _documents(operation[UNUSED], "calibration")
                judged |= _documents(operation[UNUSED], "validation")
            if operation.get("operation") not in _FITTING:
                continue
            for documents, traces in _RECORDS:
                if documents in operation:
                    record = operation[documents]
                    calibrated |= _documents(record, "calibration")
                    judged |= _documents(record, "validation")
                    is_partial = is_partial or "unnamed" in record
                elif isinstance(hashes := operation.get(traces), Mapping):
                    whole |= {text for text in hashes.values() if isinstance(text, str)}
    return KnownText(
        frozenset(calibrated),
        frozenset(judged - calibrated),
        frozenset(tried - judged - calibrated),
        frozenset(whole),
        is_partial,
    )


def refuse_known_validation(subject: Subject, validation: Corpus) -> None:
    """Raise TraceError if text that is to judge calibrated ``subject`` in an earlier step: it cannot veto anything."""
    known = known_text(subject)
    documents, _tokens = windows_in(validation, known.calibrated)
    whole = [domain for domain, text in validation.hashes.items() if text in known.whole]
    if documents or whole:
        count = f"{documents:,} documents" if documents else f"the text of {', '.join(whole)}"
        raise TraceError(
            f"{count} of the validation text calibrated {subject.name} in an earlier step, and cannot judge it: give "
            "other text to judge (--validation), or begin with the checkpoint from before that step"
        )


def _documents(record: Any, role: str) -> Hashes:
    try:
        return unpacked(record.get(role, ""))
    except (AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{PROVENANCE_NAME} holds a list of documents that is none; it was changed by hand: restore it, or remove "
            "it if nothing healed this checkpoint"
        ) from error
