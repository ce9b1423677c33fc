"""Reading the traces that an operation runs a checkpoint on."""

from __future__ import annotations

from moesurgeon.engine.model import context_length
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.subject import Subject
from moesurgeon.traces.documents import Split
from moesurgeon.traces.spec import parse_traces
from moesurgeon.traces.tokenizer import load_tokenizer
from moesurgeon.traces.windows import Corpus, load_corpus

_LENGTH = 512


def read_text(subject: Subject, text: Text, *, builtin_split: Split) -> Corpus:
    """Return the windows that ``text`` asks for, made with the subject's tokenizer.

    Builtin traces are read in ``builtin_split`` and the user's in full, unless ``text`` names a split.
    """
    specs = parse_traces(text.traces)
    splits = [text.split or (builtin_split if spec.builtin else "all") for spec in specs]
    tokenize = load_tokenizer(subject.root)
    return load_corpus(specs, tokenize, splits=splits, length=window_length(subject, text), max_tokens=text.max_tokens)


def window_length(subject: Subject, text: Text) -> int:
    """Return the length of a window in tokens; UsageError if it exceeds the checkpoint's context."""
    context = context_length(subject.anatomy)
    if text.length is None:
        return min(_LENGTH, context)
    if not 8 <= text.length <= context:
        raise UsageError(f"--length {text.length} is not between 8 and the checkpoint's context of {context} tokens")
    return text.length
