"""JSON that people and servers write: no key twice, and numbers that are numbers.

Python's own parser takes the last of two equal keys without a word, and ``true`` for 1.
"""

from __future__ import annotations

import json
import re
from typing import Any

# A string with, if it is a key, its colon; or the bounds of an object.
_PART = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]', re.DOTALL)


class _Duplicate(ValueError):
    pass


def parse_strictly(text: str) -> Any:
    """Return what ``text`` holds; ValueError, with the line, for a key that comes twice in one object.

    >>> parse_strictly('{"0": 1, "1": 2}')
    {'0': 1, '1': 2}
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _Duplicate:
        key, first, line = _duplicate_in(text)
        where = f"line {line}" if first == line else f"lines {first} and {line}"
        raise ValueError(f"the key {key} comes twice, in {where}; keep one of them") from None


def whole_number(text: str) -> int:
    """Return the number from 0 on that ``text`` spells in digits; ValueError for any other spelling of it.

    So that no two keys of an object are one number.

    >>> whole_number("12")
    12
    """
    if not re.fullmatch("0|[1-9][0-9]{0,17}", text):
        raise ValueError(f"{text[:40]!r} is no number written in digits")
    return int(text)


def holds_numbers(value: Any) -> bool:
    """Whether ``value`` is a number, or lists of numbers all the way down; ``true`` and ``"3"`` are none.

    >>> holds_numbers([[1, 2.5], []]), holds_numbers([1, True])
    (True, False)
    """
    if isinstance(value, list):
        return all(map(holds_numbers, value))
    return type(value) in (int, float)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Duplicate
    return found


def _duplicate_in(text: str) -> tuple[str, int, int]:
    """Return the first key that comes twice, as it is written, and its two lines."""
    objects: list[dict[str, int]] = []
    for part in _PART.finditer(text):
        if part[0] == "{":
            objects.append({})
        elif part[0] == "}":
            objects.pop()
        elif part[2]:
            key, line = json.loads(part[1]), text.count("\n", 0, part.start()) + 1
            if key in objects[-1]:
                return part[1], objects[-1][key], line
            objects[-1][key] = line
    raise AssertionError("the parser found a duplicate")
