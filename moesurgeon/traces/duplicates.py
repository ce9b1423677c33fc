"""One text in two places: under two names, where it would count twice, or where it both heals and judges.

Documents are the same if their names are (of a user's files a hash of the text), or if a passage of one is a passage
of the other. Of builtin traces only passages count: code and docstrings of a module have its name, and are two texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moesurgeon.errors import TraceError
from moesurgeon.traces.windows import Catalogue, Corpus

_BOILERPLATE = 0.005
"""Share of a domain's documents up to which those of another are taken for shared boilerplate."""
_OWN = "text:"  # how keys of a user's documents begin


def counted_once(corpus: Corpus) -> Corpus:
    """Return ``corpus`` with every document in one domain only.

    Where two domains share a few documents in a thousand, the later one is left without them, and a note says so.
    Raises TraceError where they share more: then one trace holds much of the other.
    """
    windows, tokens = corpus.windows, dict(corpus.tokens)
    documents, catalogues, notes = dict(corpus.documents), dict(corpus.catalogues), list(corpus.notes)
    domains = [domain for domain in corpus.domains if domain in catalogues]
    for place, domain in enumerate(domains):
        for earlier in domains[:place]:
            mine, theirs = catalogues[domain], catalogues[earlier]
            both = sorted({number for number, _ in _shared(mine, theirs)})
            if not both:
                continue
            fewest = min(len(mine.keys), len(theirs.keys))
            if len(both) > _BOILERPLATE * fewest:
                raise TraceError(
                    f"{len(both)} of the {len(mine.keys)} documents of {domain} are in {earlier} as well (as "
                    f"{mine.places[both[0]]}): they would count twice; leave one of the two out, or remove them there"
                )
            notes.append(f"{len(both)} documents of {domain} are in {earlier} as well: they count there alone")
            catalogues[domain], numbers = _without(mine, set(both))
            documents[domain] = tuple(catalogues[domain].keys)
            windows = [
                window if window.domain != domain else replace(window, document=numbers[window.document])
                for window in windows
                if window.domain != domain or window.document in numbers
            ]
            tokens[domain] = sum(len(window.tokens) for window in windows if window.domain == domain)
    return replace(
        corpus, windows=windows, tokens=tokens, documents=documents, catalogues=catalogues, notes=tuple(notes)
    )


def refuse_overlap(calibration: Corpus, validation: Corpus) -> None:
    """Raise TraceError if a document that heals is one that judges."""
    for domain, judging in validation.catalogues.items():
        for other, healing in calibration.catalogues.items():
            both = dict(_shared(judging, healing))
            if both:
                first = min(both)
                raise TraceError(
                    f"{len(both)} of the {len(judging.keys)} validation documents of {domain} are in the calibration "
                    f"text of {other} as well ({judging.places[first]} is {healing.places[both[first]]}): "
                    "what heals cannot judge; remove them from one of the two"
                )


def _shared(mine: Catalogue, theirs: Catalogue) -> Iterator[tuple[int, int]]:
    """Yield the numbers, in both, of documents that are the same."""
    for key, number in mine.keys.items():
        if key.startswith(_OWN) and key in theirs.keys:
            yield number, theirs.keys[key]
    for text, number in mine.texts.items():
        if text in theirs.texts:
            yield number, theirs.texts[text]


def _without(catalogue: Catalogue, left_out: set[int]) -> tuple[Catalogue, dict[int, int]]:
    """Return the catalogue without some documents, and the new number of each of the others by its old one."""
    keys = [(key, number) for key, number in catalogue.keys.items() if number not in left_out]
    numbers = {number: new for new, (_key, number) in enumerate(keys)}
    return (
        Catalogue(
            keys={key: numbers[number] for key, number in keys},
            places=[catalogue.places[number] for _key, number in keys],
            texts={text: numbers[number] for text, number in catalogue.texts.items() if number in numbers},
        ),
        numbers,
    )
