"""Splits of a small trace: its documents are dealt out, so that no split that is needed is empty.

The hash of a document puts it in a split whatever else is in the trace, but of 20 documents it often gives the
validation split none. A trace with few documents is ranked by the same hash instead, and the ranks are dealt out in
the same proportions. The result depends on the set of the documents alone: not on their order, copies or files.
"""

from __future__ import annotations

from collections.abc import Iterable

from moesurgeon.traces.documents import SHARES, Split, place_in_splits

FEW = 1000
"""Distinct documents from which on the hash alone decides: 5 % of so many are never none."""
_JUDGES = 5
"""Documents that validation and report get at least, as long as that is no more than a fifth of all for each."""
_FIRST: tuple[Split, ...] = ("train", "validation", "report", "calibration")
"""Which splits get the documents where there are fewer than splits: healing needs the first two."""


def deal(keys: Iterable[str]) -> dict[str, Split]:
    """Return the split of every one of ``keys``, the names of all documents of a small trace.

    Neighbours in the hash space stay together in the order of the hash's own splits, so that most documents keep
    their split when others are added, and when the trace grows beyond ``FEW``.

    >>> sorted(deal(["a", "b"]).values())
    ['train', 'validation']
    """
    ranked = sorted(set(keys), key=lambda key: (place_in_splits(key), key))
    counts = counts_of(len(ranked))
    splits = [split for split, _ in SHARES for _ in range(counts[split])]
    return dict(zip(ranked, splits, strict=True))


def counts_of(documents: int) -> dict[Split, int]:
    """Return how many of so many documents each split gets.

    >>> counts_of(3)
    {'train': 1, 'calibration': 0, 'validation': 1, 'report': 1}
    >>> counts_of(20), counts_of(100)["validation"]
    ({'train': 10, 'calibration': 2, 'validation': 4, 'report': 4}, 5)
    """
    if documents < len(_FIRST):
        return {split: int(split in _FIRST[:documents]) for split, _ in SHARES}
    judges = max(1, min(_JUDGES, documents // 5))
    least: dict[Split, int] = {"calibration": 1, "validation": judges, "report": judges}
    counts: dict[Split, int] = {split: max(least.get(split, 0), documents * share // 100) for split, share in SHARES}
    counts["train"] = documents - sum(counts[split] for split in least)
    return counts
