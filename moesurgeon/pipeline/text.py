"""Reading the traces that an operation runs a checkpoint on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moesurgeon.engine.model import context_length
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.families.keys import count_of
from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.subject import Subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.budgets import shares_of, weights_of
from moesurgeon.traces.chat import ChatTemplate
from moesurgeon.traces.documents import Split
from moesurgeon.traces.duplicates import counted_once
from moesurgeon.traces.left_out import Excluded
from moesurgeon.traces.sources import is_lone_text
from moesurgeon.traces.spec import TraceSpec, parse_traces
from moesurgeon.traces.tokenizer import load_tokenizer
from moesurgeon.traces.windows import Corpus, EmptySplit, load_corpus

_LENGTH = 512
_ANOTHER_SPLIT = "give more documents, or name another split"
_CUT = 0.5  # share of the tokens in documents longer than a window from which it is said


_LARGEST_SEED = 2**63 - 1


def read_text(
    subject: Subject,
    text: Text,
    *,
    builtin_split: Split,
    own_split: Split = "all",
    remedy: str = _ANOTHER_SPLIT,
    excluded: Excluded | None = None,
    progress: Progress = SILENT,
) -> Corpus:
    """Return the windows that ``text`` asks for, made with the subject's tokenizer; no document is in two domains.

    Builtin traces are read in ``builtin_split`` and the user's in ``own_split``, unless ``text`` names one.
    ``remedy``: what to do about a trace with too few documents for its split; ``excluded``: documents not to read.
    What the user should know of how the traces were read goes to ``progress``. Raises CheckpointError for a tokenizer
    that makes tokens the checkpoint does not have.
    """
    specs = trace_specs(text)
    splits = [text.split or (builtin_split if spec.builtin else own_split) for spec in specs]
    length = window_length(subject, text)
    with ChatTemplate(subject.root) as template:
        try:
            corpus = load_corpus(
                specs,
                load_tokenizer(subject.root),
                splits=splits,
                length=length,
                max_tokens=text.max_tokens,
                budgets=text.budgets,
                sample=text.sample,
                render=template.render,
                excluded=excluded,
            )
        except EmptySplit as error:
            raise EmptySplit.of(error.problem, remedy) from error
        corpus = counted_once(replace(corpus, chat_template=template.sha256))
    for note in (*_lone_text_notes(specs, splits), *_file_notes(corpus), *corpus.notes):
        progress.note(f"note: {note}")
    highest = max(int(window.tokens.max()) for window in corpus.windows)
    if highest >= (known := count_of(subject.anatomy.config, "vocab_size", highest + 1)):
        raise CheckpointError(
            f"the tokenizer in {subject.root} makes token {highest}, the checkpoint has {known}: "
            "it is another model's, copy the right one there"
        )
    return corpus


def _lone_text_notes(specs: Sequence[TraceSpec], splits: Sequence[Split]) -> list[str]:
    """Return a line about each text file of which neighbouring passages are in different splits."""
    return [
        f"{spec.location} is one text file, whose passages are dealt out to the splits: neighbours can be on both "
        "sides; give a folder with a file for each text, if it is not a collection"
        for spec, split in zip(specs, splits, strict=True)
        if split != "all" and is_lone_text(spec)
    ]


def _file_notes(corpus: Corpus) -> list[str]:
    """Return a line about each trace of several files: how many of them were read."""
    return [
        f"{domain}: {len(files.names)} of {files.of} files were read ({', '.join(files.names[:3])}"
        f"{', ...' if len(files.names) > 3 else ''})"
        for domain, files in corpus.files.items()
        if files.of > 1
    ]


def file_facts(corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Return by domain which of the user's files were read, as reports have it."""
    return {domain: files.as_dict() for domain, files in corpus.files.items()}


def cut_notes(subject: Subject, text: Text, corpus: Corpus) -> list[str]:
    """Return a line about documents that are far longer than a window, if most of the text is in such."""
    length, context = window_length(subject, text), context_length(subject.anatomy)
    if length == context or corpus.cut < _CUT:
        return []
    return [
        f"{corpus.cut:.0%} of the tokens are in documents longer than --length {length}: the model sees those in "
        f"pieces, and no position from {length} on; its context is {context}"
    ]


def trace_specs(text: Text) -> tuple[TraceSpec, ...]:
    """Return which traces ``text`` names; UsageError if there are none, or a budget or weight is of no use."""
    specs = parse_traces(text.traces)
    if not specs:
        raise UsageError("no traces are given; name at least one, such as builtin:all")
    domains = [spec.domain for spec in specs]
    shares_of(domains, None, text.budgets)
    weights_of(domains, text.weights)
    if text.sample is not None and not 0 <= text.sample <= _LARGEST_SEED:
        raise UsageError(f"--sample {text.sample} is no seed; give a number from 0 to {_LARGEST_SEED}")
    return specs


def window_length(subject: Subject, text: Text) -> int:
    """Return the length of a window in tokens; UsageError if it exceeds the checkpoint's context."""
    context = context_length(subject.anatomy)
    if text.length is None:
        return min(_LENGTH, context)
    if not 8 <= text.length <= context:
        raise UsageError(f"--length {text.length} is not between 8 and the checkpoint's context of {context} tokens")
    return text.length
