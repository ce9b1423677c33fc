"""Windows of tokens out of traces, within a budget: what the model is run on.

T: tokens of a window. One document per row: a window never joins two documents, so no token is
predicted, and no expert chosen, from text that has nothing to do with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesurgeon.errors import TraceError, UsageError
from moesurgeon.traces.budgets import SHORTEST, shares_of
from moesurgeon.traces.documents import Document, Split, text_digest
from moesurgeon.traces.files import FilesRead, files_of
from moesurgeon.traces.left_out import Excluded, LeftOut, none_left
from moesurgeon.traces.sampling import Sizes, sampled, small_batches
from moesurgeon.traces.sources import Reading, Usable, documents_in, read_documents
from moesurgeon.traces.spec import TraceSpec
from moesurgeon.traces.texts import Render

_CHARACTERS = 64  # of a token, more than any text has on average: more of a long document is not tokenised


class Tokenize(Protocol):
    """A tokenizer: texts in, one list of token numbers for each out, with the model's special tokens or without."""

    def __call__(self, texts: list[str], /, *, special: bool = True) -> list[list[int]]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Consecutive tokens of one document."""

    domain: str
    document: int  # its number within the domain, for intervals clustered by document
    start: int  # position in the document of the first token
    tokens: NDArray[np.int32]  # [T], SHORTEST <= T <= length


@dataclass(slots=True)
class Catalogue:
    """The documents of a domain that gave windows, by number: their keys, and where each begins.

    ``texts``: the document of every text that gave windows, by a hash of the text; a long document has several.
    """

    keys: dict[str, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    texts: dict[bytes, int] = field(default_factory=dict)

    def number(self, document: Document) -> int:
        """Return the number of ``document``, a new one if it was not seen before."""
        number = self.keys.setdefault(document.key, len(self.keys))
        if number == len(self.places):
            self.places.append(document.where or document.key)
        self.texts.setdefault(text_digest(document.text), number)
        return number


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The windows of some traces, with what artefacts have to say about where they are from."""

    windows: list[Window]
    tokens: dict[str, int] = field(default_factory=dict)  # per domain
    hashes: dict[str, str] = field(default_factory=dict)  # per domain: sha256 of the texts read
    splits: dict[str, Split] = field(default_factory=dict)  # per domain
    documents: dict[str, tuple[str, ...]] = field(default_factory=dict)  # per domain: keys, by Window.document
    catalogues: dict[str, Catalogue] = field(default_factory=dict)  # per domain: more about these documents
    left_out: dict[str, LeftOut] = field(default_factory=dict)  # per domain: documents that were passed over
    files: dict[str, FilesRead] = field(default_factory=dict)  # per domain of a user's files
    notes: tuple[str, ...] = ()  # what the user should know of how the traces were read
    chat_template: str | None = None  # sha256 of the template that made text of chats, if there were any

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains in the order of their traces."""
        return tuple(self.tokens)

    @property
    def cut(self) -> float:
        """The share of the tokens that are in documents longer than a window."""
        pieces = {(window.domain, window.document) for window in self.windows if window.start > 0}
        lengths = [len(window.tokens) for window in self.windows if (window.domain, window.document) in pieces]
        return sum(lengths) / max(1, sum(self.tokens.values()))


def load_corpus(
    specs: Sequence[TraceSpec],
    tokenize: Tokenize,
    *,
    splits: Sequence[Split],
    length: int,
    max_tokens: int | None,
    budgets: Mapping[str, str | int] | None = None,
    sample: int | None = None,
    render: Render | None = None,
    excluded: Excluded | None = None,
) -> Corpus:
    """Return windows of at most ``length`` tokens of every trace, of each in its split of ``splits``.

    ``max_tokens`` and ``budgets`` bound what is read (``budgets.shares_of``); without a bound all there is has to fit
    in memory as tokens (4 bytes each). Of a trace that holds more the first documents are read, or with the seed
    ``sample`` a uniform sample of all, which takes reading all. ``render`` makes text of chats. In place
    of documents that are ``excluded`` the next ones are read.

    Raises TraceError for a trace that cannot be read or gives no window, and UsageError for a budget
    that gives a trace less than one window.
    """
    shares = shares_of([spec.domain for spec in specs], max_tokens, budgets or {})
    corpus = Corpus(windows=[])
    usable = _is_usable(tokenize)
    for spec, split in zip(specs, splits, strict=True):
        share = shares[spec.domain]
        opened: list[Path] = []
        documents: Iterable[Document] = read_documents(spec, split, render, usable=usable, opened=opened)
        left_out = corpus.left_out[spec.domain] = LeftOut()
        if excluded is not None:
            documents = left_out.passing(documents, excluded, _usable(tokenize, length, share))
        if sample is not None:
            documents = sampled(documents, _usable(tokenize, length, share), budget=share, seed=sample)
        reading, catalogue = Reading(documents), Catalogue()
        windows = take_windows(reading, spec.domain, tokenize, length=length, max_tokens=share, catalogue=catalogue)
        if not windows and excluded is not None and left_out.keys:
            raise none_left(spec, left_out, excluded)
        if not windows:
            raise _no_text(spec, split, documents_in(spec, render, usable=usable) if spec.builtin is None else None)
        corpus.windows.extend(windows)
        corpus.tokens[spec.domain] = sum(len(window.tokens) for window in windows)
        corpus.hashes[spec.domain] = reading.sha256
        corpus.splits[spec.domain] = split
        corpus.documents[spec.domain] = tuple(catalogue.keys)
        corpus.catalogues[spec.domain] = catalogue
        if spec.builtin is None:
            location = Path(spec.location)
            corpus.files[spec.domain] = FilesRead.below(location, opened, len(files_of(location)))
    return corpus


def take_windows(
    documents: Iterable[Document],
    domain: str,
    tokenize: Tokenize,
    *,
    length: int,
    max_tokens: int | None,
    catalogue: Catalogue | None = None,
) -> list[Window]:
    """Return consecutive windows of at most ``length`` tokens until ``max_tokens`` are taken.

    Windows under 8 tokens are left out. The last window is cut to meet the budget exactly, unless
    that would leave under 8 tokens of it. Documents are tokenised a few at a time, so that a trace is
    hardly read further than its budget. ``catalogue`` receives the documents that gave windows.

    >>> words = lambda texts: [list(range(len(text.split()))) for text in texts]
    >>> document = Document("a", "one two " * 15)
    >>> [len(w.tokens) for w in take_windows([document], "d", words, length=16, max_tokens=28)]
    [16, 12]
    """
    if length < SHORTEST:
        raise UsageError(f"windows of {length} tokens are too short: raise the length to at least {SHORTEST}")
    windows: list[Window] = []
    left = max_tokens
    # Passages of one document have one key: they are one document when intervals are clustered.
    catalogue = Catalogue() if catalogue is None else catalogue
    for batch in small_batches(documents):
        for document, ids in zip(batch, _encoded(batch, tokenize, left), strict=True):
            number = None
            for start in range(0, len(ids), length):
                size = min(length, len(ids) - start)
                size = size if left is None else min(size, left)
                if size < SHORTEST:
                    break  # the end of the document or of the budget
                tokens = np.asarray(ids[start : start + size], dtype=np.int32)
                number = catalogue.number(document) if number is None else number
                windows.append(Window(domain, number, start, tokens))
                left = None if left is None else left - size
        if left is not None and left < SHORTEST:
            break  # before the next documents are read
    return windows


def _is_usable(tokenize: Tokenize) -> Usable:
    """Return what tells whether a document gives any window."""
    return lambda document: len(_encoded([document], tokenize, SHORTEST)[0]) >= SHORTEST


def _usable(tokenize: Tokenize, length: int, most: int | None) -> Sizes:
    """Return how to count the tokens of documents that windows hold."""

    def sizes(documents: list[Document]) -> list[int]:
        counts = map(len, _encoded(documents, tokenize, most))
        return [count - (count % length if count % length < SHORTEST else 0) for count in counts]

    return sizes


def _encoded(documents: list[Document], tokenize: Tokenize, most: int | None) -> list[list[int]]:
    """Return the tokens of each document, of a long one the first ``most`` at least."""
    found: list[list[int]] = [[] for _ in documents]
    for is_rendered in (False, True):
        numbers = [number for number, document in enumerate(documents) if document.is_rendered == is_rendered]
        texts = [documents[number].text for number in numbers]
        heads = texts if most is None else [text[: _CHARACTERS * most + 4096] for text in texts]
        for number, head, text, ids in zip(numbers, heads, texts, _call(tokenize, heads, is_rendered), strict=True):
            # What comes after a cut can change the tokens just before it.
            is_enough = len(head) == len(text) or (most is not None and len(ids) > most + 16)
            found[number] = ids if is_enough else _call(tokenize, [text], is_rendered)[0]
    return found


def _call(tokenize: Tokenize, texts: list[str], is_rendered: bool) -> list[list[int]]:
    # A template writes the special tokens itself; a second one in front is what the model never saw.
    return (tokenize(texts, special=False) if is_rendered else tokenize(texts)) if texts else []


def _no_text(spec: TraceSpec, split: Split, count: int | None) -> TraceError:
    """Return what is wrong with a trace of ``count`` usable documents (None: not counted) that gave no window."""
    if not count or split == "all":
        return TraceError(f"{spec.location} holds no text of at least {SHORTEST} tokens: give another trace")
    documents = "one document" if count == 1 else f"{count} documents"
    return EmptySplit.of(f"{spec.location} has {documents}, and none is left for its {split} split")


class EmptySplit(TraceError):
    """A trace has too few documents for one of them to be in the split that is asked for."""

    problem = ""

    @classmethod
    def of(cls, problem: str, remedy: str = "give more documents") -> EmptySplit:
        """Return the error that says the ``problem``, and what the user can do."""
        error = cls(f"{problem}: {remedy}")
        error.problem = problem
        return error
