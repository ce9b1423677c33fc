"""Text to measure checkpoints on that none of them was fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesurgeon.pipeline.known_text import known_text
from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.text import read_text
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.document_hashes import Hashes, windows_in
from moesurgeon.traces.left_out import Excluded, LeftOut
from moesurgeon.traces.windows import Corpus

_REMEDY = "give other text, or --include-healed for figures that are not held out"
_REMEDY_OF_RUN = "give text that no step heals on"


def held_out_text(
    subjects: Sequence[Subject],
    text: Text,
    *,
    include: bool = False,
    also: Hashes = frozenset(),
    progress: Progress = SILENT,
) -> tuple[Corpus, dict[str, Any]]:
    """Return the report text of ``subjects`` without documents that calibrated one of them, and what a report says.

    Of a trace that holds more, other documents are read in their place, up to the budget. ``include``: with them.
    ``also``: documents that are left out besides, since they heal in a step of a recipe. Raises TraceError for a trace
    of which none is left.
    """
    known = [known_text(subject) for subject in subjects]
    calibrated = frozenset().union(*(each.calibrated for each in known))
    judged = frozenset().union(*(each.judged for each in known)) - calibrated
    fitted = [each.name for each, of in zip(subjects, known, strict=True) if of.calibrated]
    name = " and ".join(fitted) or "the checkpoint"
    why = "heal in a step of the recipe" if also else f"healed {name}"
    remedy = _REMEDY_OF_RUN if also else _REMEDY
    excluded = Excluded(frozenset() if include else calibrated | also, why, remedy)
    corpus = read_text(
        subjects[0],
        text,
        builtin_split="report",
        excluded=excluded if excluded.hashes else None,
        progress=progress,
    )
    left_out = {domain: found for domain, found in corpus.left_out.items() if found.keys}
    tried = frozenset().union(*(each.tried for each in known)) - calibrated - judged
    included, judging, unused = (windows_in(corpus, hashes) for hashes in (calibrated, judged, tried))
    whole = [domain for domain, sha256 in corpus.hashes.items() if any(sha256 in each.whole for each in known)]
    notes = [
        *_notes(left_out, why),
        *(
            f"{_count(found)} {what}"
            for found, what in (
                (included, f"healed {name}: the figures are not held out"),
                (judging, "judged the healing (validation): figures on them are somewhat too good"),
                (unused, "were read to heal, and nothing came of it: they are measured on"),
            )
            if found[0]
        ),
    ]
    if whole:
        notes.append(
            f"the text of {', '.join(whole)} is what healed {name}, by a record of an earlier version: the figures are "
            "not held out"
        )
    if any(each.is_partial for each in known):
        notes.append("more documents healed than the record names: some of them may be measured on")
    for note in notes:
        progress.note(f"note: {note}")
    return corpus, {
        "left_out": {
            "documents": sum(len(found.keys) for found in left_out.values()),
            "tokens": sum(found.tokens for found in left_out.values()),
        },
        "included": {"documents": included[0], "tokens": included[1]},
        "judged": {"documents": judging[0], "tokens": judging[1]},
        "tried": {"documents": unused[0], "tokens": unused[1]},
        "unnamed": whole,
    }


def _notes(left_out: Mapping[str, LeftOut], why: str) -> Iterator[str]:
    """Yield a line about documents that were passed over, if there are any."""
    if left_out:
        documents = sum(len(found.keys) for found in left_out.values())
        tokens = sum(found.tokens for found in left_out.values())
        yield (
            f"{_count((documents, tokens))} of {', '.join(left_out)} {why}: they are left out, others are read as far "
            "as there are any"
        )


def _count(found: tuple[int, int]) -> str:
    documents, tokens = found
    return f"{documents:,} document{'s' * (documents != 1)} ({tokens:,} tokens)"
