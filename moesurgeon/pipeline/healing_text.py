"""The text that heals and the text that judges: read before any work, kept apart, counted and said."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from moesurgeon.pipeline.options import HealSpec, Text
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.text import read_text
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.amounts import amounts
from moesurgeon.traces.documents import Split
from moesurgeon.traces.duplicates import refuse_overlap
from moesurgeon.traces.windows import Corpus

_MORE = (
    "give more documents (two are the least, four where the calibration split heals), or text that judges with "
    "--validation"
)


def read_healing_text(
    subject: Subject, calibration: Text, validation: Text, *, is_given: bool, progress: Progress = SILENT
) -> tuple[Corpus, Corpus]:
    """Return the text that heals and the text that judges.

    ``is_given``: the second is of files of its own. Then the user's files are read whole, else in splits. Builtin
    traces are always read in the calibration and in the validation split. Raises TraceError where a document is in
    both, and for a trace of which no document is left to judge.
    """
    own: tuple[Split, Split] = ("all", "all") if is_given else ("train", "validation")
    healing = read_text(
        subject, calibration, builtin_split="calibration", own_split=own[0], remedy=_MORE, progress=progress
    )
    said = progress if is_given else SILENT  # else it is said of the same files already
    judging = read_text(subject, validation, builtin_split="validation", own_split=own[1], remedy=_MORE, progress=said)
    refuse_overlap(healing, judging)
    return healing, judging


def healing_text(subject: Subject, spec: HealSpec, progress: Progress) -> tuple[Corpus, Corpus]:
    """Return the text that heals and the text that judges."""
    return read_healing_text(subject, spec.text, spec.judging, is_given=bool(spec.validation), progress=progress)


def judging_text(text: Text, validation: tuple[str, ...], heldout_tokens: int) -> Text:
    """Return the text that judges what is trained on ``text``: its validation split, or ``validation`` if given."""
    judging = text.even(max_tokens=heldout_tokens, split=None if validation else "validation")
    return replace(judging, traces=validation, sample=None) if validation else judging


def recovery_text(
    subject: Subject, text: Text, validation: tuple[str, ...], heldout_tokens: int, progress: Progress
) -> tuple[Corpus, Corpus]:
    """Return the text to train on, and ``heldout_tokens`` of text that judges: of ``validation`` if there are any."""
    judging = judging_text(text, validation, heldout_tokens)
    return read_healing_text(subject, text, judging, is_given=bool(validation), progress=progress)


def planned(subject: Subject, spec: HealSpec, progress: Progress) -> dict[str, Any]:
    """Return what a dry run says of healing, with how much text there is for it."""
    healing, judging = healing_text(subject, spec, progress)
    return {"planned": asdict(spec), "text": say_amounts(healing, judging, progress)}


def facts_of(healing: Corpus, judging: Corpus) -> dict[str, Any]:
    """Return by role and domain how much text there is, as reports have it."""
    return {"calibration": text_facts(healing), "validation": text_facts(judging)}


def say_amounts(healing: Corpus, judging: Corpus, progress: Progress) -> dict[str, Any]:
    """Say how much text heals and how much judges; return it by role, as reports have it."""
    facts = facts_of(healing, judging)
    for role, domains in facts.items():
        progress.note(f"{role} text: {amounts(domains)}")
    return facts


def text_facts(corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Return by domain how many documents and tokens were read, of which split and of which files."""
    return {
        domain: {
            "documents": len({window.document for window in corpus.windows if window.domain == domain}),
            "tokens": corpus.tokens[domain],
            "split": corpus.splits[domain],
            **({"files": corpus.files[domain].as_dict()} if domain in corpus.files else {}),
        }
        for domain in corpus.domains
    }
