"""Documents out of traces: their texts, and the split of each.

Everything is read as a stream, so a trace may be larger than memory. Nothing is unpickled, no code
that comes with a dataset is run, and the network is not used.

A document of a user's file is named by a hash of its text. So its split depends on the set of the texts alone: the
same text in two files, or in a copy with another name or format, is never in two splits. A text file among others is
one document, and all its passages have its name. A lone text file is more often a collection: its passages are
documents of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from moesurgeon.errors import TraceError
from moesurgeon.traces.builtin import BUILTIN_TRACES
from moesurgeon.traces.dealing import FEW, deal
from moesurgeon.traces.documents import Document, Split, split_of
from moesurgeon.traces.files import files_of
from moesurgeon.traces.formats import is_plain_text, reader_of, text_pieces
from moesurgeon.traces.spec import TraceSpec
from moesurgeon.traces.texts import Render, document_of, key_of_pieces

Usable = Callable[[Document], bool]


class Reading:
    """Passes documents on and keeps a hash of the texts that went by, for artefacts to refer to.

    ``sha256`` covers what has been consumed so far, in order: two readings stopped at the same place
    agree exactly if their texts do.

    >>> reading = Reading([Document("a", "one"), Document("b", "two")])
    >>> [document.text for document in reading], len(reading.sha256)
    (['one', 'two'], 64)
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self._documents = documents
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[Document]:
        for document in self._documents:
            text = document.text.encode()
            # With its length: "ab" + "c" must not equal "a" + "bc".
            self._hash.update(len(text).to_bytes(8, "big") + text)
            yield document

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the texts consumed so far."""
        return self._hash.hexdigest()


def read_documents(
    spec: TraceSpec,
    split: Split,
    render: Render | None = None,
    *,
    usable: Usable | None = None,
    opened: list[Path] | None = None,
) -> Iterator[Document]:
    """Yield the documents of a trace that belong to ``split``, in the order of its files.

    ``render`` makes text of chats (``texts.document_of``). Empty texts are skipped. ``usable`` tells which documents
    count where few are dealt out. ``opened`` receives the files as they are read.
    Raises TraceError, naming file and line, for whatever cannot be read.

    >>> next(read_documents(TraceSpec(domain="sums", location="builtin:arithmetic"), "report")).key
    'arithmetic:5'
    """
    if spec.builtin is not None:
        yield from BUILTIN_TRACES[spec.builtin](split)
        return
    files = files_of(Path(spec.location))
    if split == "all":
        yield from _documents(files, spec, render, opened)
        return
    dealt = _dealt(files, spec, render, usable)
    for document in _documents(files, spec, render, opened):
        where = split_of(document.key) if dealt is None else dealt.get(document.key)
        if where == split:
            yield document


def documents_in(spec: TraceSpec, render: Render | None = None, *, usable: Usable | None = None) -> int | None:
    """Return how many different documents a user's trace has; None if there are ``FEW`` or more."""
    dealt = _dealt(files_of(Path(spec.location)), spec, render, usable)
    return None if dealt is None else len(dealt)


def is_lone_text(spec: TraceSpec) -> bool:
    """Whether the trace is a single text file, of which every passage is a document of its own."""
    if spec.builtin is not None:
        return False
    files = files_of(Path(spec.location))
    return len(files) == 1 and is_plain_text(files[0])


def _dealt(
    files: Sequence[Path], spec: TraceSpec, render: Render | None, usable: Usable | None
) -> dict[str, Split] | None:
    """Return the split of each document of a small trace by its key; None for one with ``FEW`` or more."""
    keys: set[str] = set()
    for file in files:
        for document in _documents([file], spec, render, is_alone=len(files) == 1):
            if document.key not in keys and (usable is None or usable(document)):
                keys.add(document.key)
                if len(keys) == FEW:
                    return None
            if len(files) > 1 and is_plain_text(file) and document.key in keys:
                break  # its other passages are in the same split
    return deal(keys)


def _documents(
    files: Sequence[Path],
    spec: TraceSpec,
    render: Render | None,
    opened: list[Path] | None = None,
    *,
    is_alone: bool | None = None,
) -> Iterator[Document]:
    """Yield the documents of ``files``; ``is_alone``: there are no others in the trace (None: as many as given)."""
    is_alone = len(files) == 1 if is_alone is None else is_alone
    for file in files:
        reader = reader_of(file)
        assert reader is not None
        if opened is not None:
            opened.append(file)
        key = None if is_alone or not is_plain_text(file) else key_of_pieces(text_pieces(file))
        for where, value in reader(file, spec.column):
            try:
                document = document_of(value, render)
            except ValueError as error:
                raise TraceError(f"{where}: {error}") from error
            if document is not None:
                yield Document(key or document.key, document.text, document.is_rendered, where)
