"""Reading the traces that an operation runs a checkpoint on."""

from __future__ import annotations

from dataclasses import replace

from moesurgeon.engine.model import context_length
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.families.keys import count_of
from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.subject import Subject
from moesurgeon.traces.budgets import shares_of, weights_of
from moesurgeon.traces.chat import ChatTemplate
from moesurgeon.traces.documents import Split
from moesurgeon.traces.spec import TraceSpec, parse_traces
from moesurgeon.traces.tokenizer import load_tokenizer
from moesurgeon.traces.windows import Corpus, load_corpus

_LENGTH = 512
_CUT = 0.5  # share of the tokens in documents longer than a window from which it is said


_LARGEST_SEED = 2**63 - 1


def read_text(subject: Subject, text: Text, *, builtin_split: Split, own_split: Split = "all") -> Corpus:
    """Return the windows that ``text`` asks for, made with the subject's tokenizer.

    Builtin traces are read in ``builtin_split`` and the user's in ``own_split``, unless ``text`` names one.
    Raises CheckpointError for a tokenizer that makes tokens the checkpoint does not have.
    """
    specs = trace_specs(text)
    splits = [text.split or (builtin_split if spec.builtin else own_split) for spec in specs]
    length = window_length(subject, text)
    with ChatTemplate(subject.root) as template:
        corpus = load_corpus(
            specs,
            load_tokenizer(subject.root),
            splits=splits,
            length=length,
            max_tokens=text.max_tokens,
            budgets=text.budgets,
            sample=text.sample,
            render=template.render,
        )
        corpus = replace(corpus, chat_template=template.sha256)
    highest = max(int(window.tokens.max()) for window in corpus.windows)
    if highest >= (known := count_of(subject.anatomy.config, "vocab_size", highest + 1)):
        raise CheckpointError(
            f"the tokenizer in {subject.root} makes token {highest}, the checkpoint has {known}: "
            "it is another model's, copy the right one there"
        )
    return corpus


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
