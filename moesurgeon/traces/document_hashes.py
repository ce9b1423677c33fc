"""Documents by short hashes: enough of a text for a record to know it again, and nothing of what it says.

A document of a user's is known by its text and, where its text is a passage of a file, by the file as well. A builtin
one is known by its name and text together: modules share names, and splits of generated text share no document.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection
from typing import TYPE_CHECKING

from moesurgeon.traces.documents import Document, text_digest

if TYPE_CHECKING:
    from moesurgeon.traces.windows import Corpus

Hashes = frozenset[str]

_BYTES, LETTERS = 5, 8
"""Of a hash: comparing 100,000 documents with 100,000 others, one comparison in a hundred has a false match."""
MOST = 1 << 18
"""Documents that a record names at most, in 2 MiB."""
_OWN = "text:"  # how the names of a user's documents begin
_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz234567")


def hashes_of(document: Document) -> set[str]:
    """Return by which hashes ``document`` is known.

    >>> len(hashes_of(Document("json/decoder.py", "a text")))
    1
    """
    return _hashes(document.key, text_digest(document.text))


def documents_of(corpus: Corpus) -> Hashes:
    """Return the hashes of all documents of which ``corpus`` has windows."""
    found: set[str] = set()
    for numbers, domain in _numbers(corpus):
        catalogue = corpus.catalogues[domain]
        keys = list(catalogue.keys)
        for text, number in catalogue.texts.items():
            if number in numbers:
                found |= _hashes(keys[number], text)
    return frozenset(found)


def windows_in(corpus: Corpus, hashes: Hashes) -> tuple[int, int]:
    """Return of how many documents of ``corpus`` a hash is among ``hashes``, and how many tokens these have."""
    documents = tokens = 0
    for numbers, domain in _numbers(corpus):
        catalogue = corpus.catalogues[domain]
        keys = list(catalogue.keys)
        known = {
            number
            for text, number in catalogue.texts.items()
            if number in numbers and not hashes.isdisjoint(_hashes(keys[number], text))
        }
        documents += len(known)
        tokens += sum(
            len(window.tokens) for window in corpus.windows if window.domain == domain and window.document in known
        )
    return documents, tokens


def packed(hashes: Collection[str]) -> str:
    """Return ``hashes`` in order as one string, the first ``MOST`` of them.

    >>> packed({"bbbbbbbb", "aaaaaaaa"})
    'aaaaaaaabbbbbbbb'
    """
    return "".join(sorted(hashes)[:MOST])


def unpacked(text: object) -> Hashes:
    """Return the hashes that ``packed`` put together; ValueError for what it cannot have made.

    >>> sorted(unpacked("aaaaaaaabbbbbbbb"))
    ['aaaaaaaa', 'bbbbbbbb']
    """
    is_whole = isinstance(text, str) and len(text) % LETTERS == 0 and len(text) <= LETTERS * MOST
    if not isinstance(text, str) or not is_whole or not _ALPHABET.issuperset(text):
        raise ValueError("not a list of documents")
    return frozenset(text[start : start + LETTERS] for start in range(0, len(text), LETTERS))


def _numbers(corpus: Corpus) -> list[tuple[set[int], str]]:
    """Return by domain the numbers of the documents that windows are of."""
    numbers: dict[str, set[int]] = {domain: set() for domain in corpus.catalogues}
    for window in corpus.windows:
        if window.domain in numbers:
            numbers[window.domain].add(window.document)
    return [(found, domain) for domain, found in numbers.items()]


def _hashes(key: str, text: bytes) -> set[str]:
    if not key.startswith(_OWN):
        return {_short(hashlib.blake2b(key.encode() + b"\n" + text, digest_size=_BYTES).digest())}
    return {_short(text), _short(bytes.fromhex(key.removeprefix(_OWN)))}


def _short(digest: bytes) -> str:
    return base64.b32encode(digest[:_BYTES]).decode().lower()
