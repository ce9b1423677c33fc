"""Documents out of traces: which files a trace is made of, their texts, and the split of each.

Everything is read as a stream, so a trace may be larger than memory. Nothing is unpickled, no code
that comes with a dataset is run, and the network is not used.

A document of a user's file is named by a hash of its text. So its split depends on nothing else: the
same text in two files, or in a copy with another name or format, is never in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from moesurgeon.errors import TraceError
from moesurgeon.traces.builtin import BUILTIN_TRACES
from moesurgeon.traces.documents import Document, Split, in_split
from moesurgeon.traces.formats import READERS, reader_of
from moesurgeon.traces.spec import TraceSpec
from moesurgeon.traces.texts import Render, document_of

_READABLE = f"a {', '.join(READERS)} file, a folder of them or one saved by datasets"


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


def read_documents(spec: TraceSpec, split: Split, render: Render | None = None) -> Iterator[Document]:
    """Yield the documents of a trace that belong to ``split``, in the order of its files.

    ``render`` makes text of chats (``texts.document_of``). Empty texts are skipped.
    Raises TraceError, naming file and line, for whatever cannot be read.

    >>> next(read_documents(TraceSpec(domain="sums", location="builtin:arithmetic"), "report")).key
    'arithmetic:5'
    """
    if spec.builtin is not None:
        yield from BUILTIN_TRACES[spec.builtin](split)
        return
    for file in _files(Path(spec.location)):
        reader = reader_of(file)
        if reader is None:
            raise TraceError(f"{file}: not a kind of file that can be read: give {_READABLE}")
        for where, value in reader(file, spec.column):
            try:
                document = document_of(value, render)
            except ValueError as error:
                raise TraceError(f"{where}: {error}") from error
            if document is not None and in_split(document.key, split):
                yield document


def _files(path: Path) -> Iterator[Path]:
    """Yield what to read at ``path``: itself, or the readable files of a plain folder in sorted order."""
    if not path.exists():
        raise TraceError(f"{path}: no such file or folder: check the path")
    if not path.is_dir() or reader_of(path):
        yield path
        return
    found = False
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        # A README and *.json more often describe a dataset than they are part of one.
        about = file.suffix == ".json" or file.stem == "README"
        if file.is_file() and not hidden and not about and reader_of(file):
            found = True
            yield file
    if not found:
        raise TraceError(f"{path}: a folder without traces: give {_READABLE}")
