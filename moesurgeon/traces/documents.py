"""What a trace is made of: documents with a name, assigned to splits by a hash of that name.

A document belongs to exactly one split, whatever else is in the collection and whatever machine or
Python version reads it, so that text used to calibrate is never the text that a result is reported on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

Split = Literal["train", "calibration", "validation", "report", "all"]

SPLITS: tuple[Split, ...] = get_args(Split)

# Shares of the hash space, in order. "train" is what the tiny checkpoints learnt from; the other
# three are unseen by them and disjoint from each other.
SHARES: tuple[tuple[Split, int], ...] = (
    ("train", 70),
    ("calibration", 14),
    ("validation", 5),
    ("report", 11),
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text: ``key`` names it for good (a module path, a hash), ``text`` is not empty.

    Passages of one long document share its key. ``is_rendered``: a chat template wrote it, and with it the special
    tokens that the model wants. ``where``: file and line, for messages.
    """

    key: str
    text: str
    is_rendered: bool = False
    where: str = field(default="", compare=False)


def split_of(key: str) -> Split:
    """Return the split that the document ``key`` belongs to.

    >>> split_of("json/decoder.py") == split_of("json/decoder.py")
    True
    """
    point, _ = place_in_splits(key)
    for split, share in SHARES:
        if point < share:
            return split
        point -= share
    raise AssertionError("the shares of the splits must add up to 100")


def text_digest(text: str) -> bytes:
    """Return what a text is known again by: 8 bytes of a hash of its words, whatever white space is between them.

    >>> text_digest("a text") == text_digest(" a\\ntext\\n") != text_digest("atext")
    True
    """
    return digest_of_pieces((text,))


def digest_of_pieces(pieces: Iterable[str]) -> bytes:
    """Return the digest of the text that ``pieces`` make; one piece at a time, which may end within a word."""
    digest = hashlib.blake2b(digest_size=8)
    has_begun, is_between = False, False
    for piece in pieces:
        if words := " ".join(piece.split()):
            is_between |= piece[0].isspace()
            digest.update((" " + words if has_begun and is_between else words).encode())
            has_begun, is_between = True, piece[-1].isspace()
        else:
            is_between |= piece != ""
    return digest.digest()


def place_in_splits(key: str) -> tuple[int, int]:
    """Return where ``key`` is in the hash space: its point from 0 to 99, then what orders keys of one point."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return number % 100, number


def in_split(key: str, split: Split) -> bool:
    """Tell whether the document ``key`` belongs to ``split`` (``all``: every one does)."""
    return split == "all" or split_of(key) == split
