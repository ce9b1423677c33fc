"""Small valid checkpoints and ways to spoil them: bytes, and JSON in shape and content."""

from __future__ import annotations

import copy
import json
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

NESTED: Any = [[]]
for _ in range(400):
    NESTED = [NESTED]

VALUES: list[Any] = [
    0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63 - 1, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    True, False, None,
    "", "0", "1", "07", " 1", "\u0661", "mixtral", "F32", "F4", "model.safetensors", "..", ".", "/etc/passwd",
    "../outside.safetensors", "a/b.safetensors", "a\\b", "nul\0", "new\nline", "\x1b[2J", "\ud800", "\U0001f999",
    "\u00e9" * 200 + ".safetensors", "x" * 100_000,
    [], [0], [-1], [[]], [1, 2], [0, 2**62], [1] * 65, [2**40, 2**40], ["a"], [None], [0.5], ["0", "1"],
    {}, {"": 0}, {"0": [0]}, {"0": {"0": 0}}, {"a": "b"}, {"operation": "prune"}, NESTED,
]  # fmt: skip
STEPS = ("value", "drop", "rename", "double", "wrap", "other", "more")
# (where, what, which value, where else): numbers are taken modulo what there is.
MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 2**20), st.sampled_from(STEPS), st.integers(0, len(VALUES) - 1), st.integers(0, 2**20)
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip
# (where, what, byte)
BYTES = st.lists(
    st.tuples(st.integers(0, 2**20), st.sampled_from(("set", "insert", "remove", "cut")), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def mutated(document: Any, mutations: Sequence[tuple[int, str, int, int]]) -> Any:
    """Return a copy of a JSON document after ``mutations``."""
    document = copy.deepcopy(document)
    for where, step, which, elsewhere in mutations:
        places = list(_places(document))
        if not places:
            break
        container, key = places[where % len(places)]
        other, name = places[elsewhere % len(places)]
        value = copy.deepcopy(VALUES[which])
        match step:
            case "value":
                container[key] = value
            case "drop":
                del container[key]
            case "rename" if isinstance(container, dict):
                container[str(value)[:300]] = container.pop(key)
            case "double":
                container[key] = [container[key], copy.deepcopy(container[key])]
            case "wrap":
                container[key] = {"": container[key]}
            case "other":
                container[key] = copy.deepcopy(other[name])
            case _ if isinstance(container, dict):
                container[str(value)[:300]] = copy.deepcopy(other[name])
            case _:
                container.append(copy.deepcopy(other[name]))
    return document


def _places(document: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything in ``document``, not too deep."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        yield document, key
        if isinstance(value, dict | list) and depth < 6:
            yield from _places(value, depth + 1)


def spoiled(raw: bytes, changes: Sequence[tuple[int, str, int]], end: int | None = None) -> bytes:
    """Return ``raw`` after ``changes``, all of them before ``end``."""
    changed = bytearray(raw)
    for where, step, byte in changes:
        place = where % max(1, min(len(changed), end or len(changed)))
        match step:
            case "set":
                changed[place : place + 1] = bytes([byte])
            case "insert":
                changed[place:place] = bytes([byte])
            case "remove":
                del changed[place : place + byte]
            case _:
                del changed[place:]
    return bytes(changed)


def written(document: Any) -> bytes:
    """Return a document as JSON; half characters as they are escaped, no-numbers as Python writes them."""
    return json.dumps(document).encode()


def header_of(raw: bytes) -> tuple[Any, bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = written(header)
    return struct.pack("<Q", len(text)) + text + data


# An audit hook stays for the life of the process, so there is one, which looks when told to.
_watched: list[tuple[str, ...]] = []
_outside: list[str] = []
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        paths = arguments[:1]
    elif event in _CHANGES:
        paths = arguments[1:2] if event == "os.link" else arguments[:2]
    else:
        return
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            name = os.path.realpath(os.fsdecode(path))
            if not name.startswith(_watched[-1]) and name != os.devnull:
                _outside.append(f"{event} {name}")


sys.addaudithook(_audit)


@contextmanager
def writes_only_to(*places: Path) -> Iterator[None]:
    """Fail if anything that does not begin with one of ``places`` is written, made, moved or removed."""
    _outside.clear()
    _watched.append(tuple(os.path.realpath(place) for place in places))
    try:
        yield
    finally:
        _watched.pop()
    assert not _outside, _outside
