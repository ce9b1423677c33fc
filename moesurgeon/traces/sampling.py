"""A uniform sample of a trace's documents, where the budget is smaller than the trace.

Every text has a place in a random order, a hash of itself with the seed. The sample is the beginning of that order, as
far as the budget goes: the same whatever order, files or format the texts come in, and a larger budget only adds to
it. It takes one reading of the whole trace, and memory for the sample alone.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator

from moesurgeon.traces.documents import Document

_BATCH_DOCUMENTS = 16
_BATCH_CHARACTERS = 1 << 17

Sizes = Callable[[list[Document]], list[int]]
"""Tokens of each document that count towards the budget."""


def sampled(documents: Iterable[Document], sizes: Sizes, *, budget: int | None, seed: int) -> list[Document]:
    """Return the documents of the sample in its order: as few as make ``budget`` tokens (None: all, so ordered).

    A text that comes more than once is taken once.

    >>> words = [Document(word, word) for word in "a few words to choose from".split()]
    >>> lengths = lambda batch: [len(document.text) for document in batch]
    >>> some = sampled(words, lengths, budget=6, seed=0)
    >>> some == sampled(reversed(words), lengths, budget=6, seed=0), sum(lengths(some)) >= 6, len(some) < len(words)
    (True, True, True)
    """
    heap: list[tuple[int, int, Document]] = []  # the last of the order first: (-place, tokens, document)
    places: set[int] = set()
    total = 0

    def might_stay() -> Iterator[Document]:
        for document in documents:
            if budget is None or total < budget or place_of(document, seed) < -heap[0][0]:
                yield document

    for batch in small_batches(might_stay()):
        for document, size in zip(batch, sizes(batch), strict=True):
            place = place_of(document, seed)
            if place in places or size == 0:
                continue
            heapq.heappush(heap, (-place, size, document))
            places.add(place)
            total += size
            while budget is not None and total - heap[0][1] >= budget:
                last = heapq.heappop(heap)
                places.remove(-last[0])
                total -= last[1]
    return [document for _, _, document in sorted(heap, key=lambda entry: -entry[0])]


def place_of(document: Document, seed: int) -> int:
    """Return the place of a document in the order that ``seed`` makes; independent of its split."""
    salt = seed.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(document.text.encode(), digest_size=16, salt=salt).digest(), "big")


def small_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield a few documents at a time: a tokenizer works on several, and a trace is not to be read far ahead."""
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
