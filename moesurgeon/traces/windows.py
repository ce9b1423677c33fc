"""Windows of tokens out of traces, within a budget: what the model is run on.

T: tokens of a window. One document per row: a window never joins two documents, so no token is
predicted, and no expert chosen, from text that has nothing to do with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesurgeon.errors import TraceError, UsageError
from moesurgeon.traces.documents import Document, Split
from moesurgeon.traces.sources import Reading, read_documents
from moesurgeon.traces.spec import TraceSpec

SHORTEST = 8  # tokens; fewer say little, and are mostly special tokens
_BATCH_DOCUMENTS = 16
_BATCH_CHARACTERS = 1 << 17


class Tokenize(Protocol):
    """A tokenizer: texts in, one list of token numbers for each out."""

    def __call__(self, texts: list[str], /) -> list[list[int]]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Consecutive tokens of one document."""

    domain: str
    document: int  # its number within the domain, for intervals clustered by document
    start: int  # position in the document of the first token
    tokens: NDArray[np.int32]  # [T], SHORTEST <= T <= length


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The windows of some traces, with what artefacts have to say about where they are from."""

    windows: list[Window]
    tokens: dict[str, int] = field(default_factory=dict)  # per domain
    hashes: dict[str, str] = field(default_factory=dict)  # per domain: sha256 of the texts read
    splits: dict[str, Split] = field(default_factory=dict)  # per domain

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains in the order of their traces."""
        return tuple(self.tokens)


def load_corpus(
    specs: Sequence[TraceSpec], tokenize: Tokenize, *, splits: Sequence[Split], length: int, max_tokens: int | None
) -> Corpus:
    """Return windows of at most ``length`` tokens of every trace, of each in its split of ``splits``.

    ``max_tokens`` is for all traces together and divided evenly among them; what a short trace leaves
    is not given to the others, so that a domain's share does not depend on its neighbours. None: all
    there is, which has to fit in memory as tokens (4 bytes each).

    Raises TraceError for a trace that cannot be read or gives no window, and UsageError for a budget
    that gives a trace less than one window.
    """
    if max_tokens is not None and max_tokens < SHORTEST * len(specs):
        raise UsageError(
            f"{max_tokens} tokens are too few for {len(specs)} traces: "
            f"raise --max-tokens to at least {SHORTEST * len(specs)}"
        )
    corpus = Corpus(windows=[])
    for number, (spec, split) in enumerate(zip(specs, splits, strict=True)):
        # The first traces get the tokens that do not divide.
        share = None if max_tokens is None else (max_tokens + len(specs) - 1 - number) // len(specs)
        reading = Reading(read_documents(spec, split))
        windows = take_windows(reading, spec.domain, tokenize, length=length, max_tokens=share)
        if not windows:
            raise _no_text(spec, split)
        corpus.windows.extend(windows)
        corpus.tokens[spec.domain] = sum(len(window.tokens) for window in windows)
        corpus.hashes[spec.domain] = reading.sha256
        corpus.splits[spec.domain] = split
    return corpus


def take_windows(
    documents: Iterable[Document], domain: str, tokenize: Tokenize, *, length: int, max_tokens: int | None
) -> list[Window]:
    """Return consecutive windows of at most ``length`` tokens until ``max_tokens`` are taken.

    Windows under 8 tokens are left out. The last window is cut to meet the budget exactly, unless
    that would leave under 8 tokens of it. Documents are tokenised a few at a time, so that a trace is
    hardly read further than its budget.

    >>> words = lambda texts: [list(range(len(text.split()))) for text in texts]
    >>> document = Document("a", "one two " * 15)
    >>> [len(w.tokens) for w in take_windows([document], "d", words, length=16, max_tokens=28)]
    [16, 12]
    """
    if length < SHORTEST:
        raise UsageError(f"windows of {length} tokens are too short: raise the length to at least {SHORTEST}")
    windows: list[Window] = []
    # No budget is one that is never used up.
    left = float("inf") if max_tokens is None else max_tokens
    # Pieces of one module have one key: they are one document when intervals are clustered.
    numbers: dict[str, int] = {}
    for batch in _small_batches(documents):
        for document, ids in zip(batch, tokenize([document.text for document in batch]), strict=True):
            number = numbers.setdefault(document.key, len(numbers))
            for start in range(0, len(ids), length):
                size = int(min(length, left, len(ids) - start))
                if size < SHORTEST:
                    break  # the end of the document or of the budget
                tokens = np.asarray(ids[start : start + size], dtype=np.int32)
                windows.append(Window(domain, number, start, tokens))
                left -= size
        if left < SHORTEST:
            break  # before the next documents are read
    return windows


def _small_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _no_text(spec: TraceSpec, split: Split) -> TraceError:
    if spec.builtin is None and split != "all" and next(read_documents(spec, "all"), None) is not None:
        return TraceError(
            f"{spec.location} holds no text in its {split} split: "
            "it is too small to be split, use --split all or give a larger file"
        )
    return TraceError(f"{spec.location} holds no text of at least {SHORTEST} tokens: give another trace")
