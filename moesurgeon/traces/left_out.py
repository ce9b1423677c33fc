"""Documents that are passed over while a trace is read, and how much text they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moesurgeon.errors import TraceError
from moesurgeon.traces.document_hashes import Hashes, hashes_of
from moesurgeon.traces.documents import Document
from moesurgeon.traces.sampling import Sizes
from moesurgeon.traces.spec import TraceSpec


@dataclass(frozen=True, slots=True)
class Excluded:
    """Documents not to read. ``why``: what they did, as in "healed CKPT"; ``remedy``: what to do if none is left."""

    hashes: Hashes
    why: str
    remedy: str


@dataclass(slots=True)
class LeftOut:
    """The names of the documents of a trace that were passed over, and the tokens of windows that they would make."""

    keys: set[str] = field(default_factory=set)
    tokens: int = 0

    def passing(self, documents: Iterable[Document], excluded: Excluded, sizes: Sizes) -> Iterator[Document]:
        """Yield those of ``documents`` that are not ``excluded``, and remember the others."""
        for document in documents:
            if excluded.hashes.isdisjoint(hashes_of(document)):
                yield document
            elif tokens := sizes([document])[0]:
                self.keys.add(document.key)
                self.tokens += tokens


def none_left(spec: TraceSpec, left_out: LeftOut, excluded: Excluded) -> TraceError:
    """Return what is wrong with a trace of which all documents are excluded."""
    count = len(left_out.keys)
    documents = "the only document" if count == 1 else f"all {count:,} documents"
    return TraceError(f"{spec.location}: {documents} {excluded.why}, and none is left to measure on: {excluded.remedy}")
