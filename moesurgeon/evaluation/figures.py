"""The figures of an evaluation by the names that gates use: which there are, and which there can be.

A figure is a number in the report's JSON. What is under ``against`` can be named without it, also within
``domains``, wherever the report itself has nothing of that name.
"""

from __future__ import annotations

import difflib
import keyword
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]
Figures = Mapping[Path, float | None]
"""By path into the report; None: a figure without a value, as the ratio of nothing."""


def figures_of(report: Mapping[str, Any]) -> dict[Path, float | None]:
    """Return all figures of a report.

    >>> found = figures_of({"loss": 2.0, "against": {"loss": 1.0, "kl": 0.1}})
    >>> {name_of(path): value for path, value in found.items()}
    {'loss': 2.0, 'against.loss': 1.0, 'against.kl': 0.1, 'kl': 0.1}
    """
    found = dict(_numbers(report))
    for path, value in _numbers(report.get("against", {})):
        found.setdefault(path, value)
    return found


def name_of(path: Path) -> str:
    """Return what a gate calls a figure.

    >>> name_of(("domains", "my-code", "interval", 1))
    'domains["my-code"].interval[1]'
    """
    first, *rest = path
    return str(first) + "".join(
        f".{part}"
        if isinstance(part, str) and part.isidentifier() and not keyword.iskeyword(part)
        else f'["{part}"]'
        if isinstance(part, str)
        else f"[{part}]"
        for part in rest
    )


def is_interval_end(path: Path) -> bool:
    """Tell whether a figure is an end of an interval over documents.

    >>> is_interval_end(("against", "interval", 1)), is_interval_end(("perplexity",))
    (True, False)
    """
    return len(path) > 1 and path[-2] in ("interval", "ratio_interval")


def why_unknown(path: Path, known: Figures) -> str:
    """Say what is wrong with a name that is none of the ``known`` ones, and what there is in its place."""
    depth = next(size for size in range(len(path), -1, -1) if _below(path[:size], known))
    below = _below(path[:depth], known)
    inside = name_of(path[:depth]) if depth else "the report"
    if depth == len(path):
        return f"{inside} is no figure by itself; name one of {_listed(path, below)}"
    wrong = path[depth]
    close = difflib.get_close_matches(str(wrong), [str(each) for each in below], 1) if isinstance(wrong, str) else []
    meant = f"did you mean {name_of((*path[:depth], close[0]))}? " if close else ""
    return f"there is no {name_of(path)}; {meant}{inside} has {_listed(path[:depth], below)}"


def _below(path: Path, known: Figures) -> list[str | int]:
    """Return what can follow ``path``."""
    size = len(path)
    return list(dict.fromkeys(each[size] for each in known if len(each) > size and each[:size] == path))


def _listed(path: Path, below: list[str | int]) -> str:
    return ", ".join(name_of((*path, each))[len(name_of(path)) if path else 0 :].removeprefix(".") for each in below)


def _numbers(value: Any, path: Path = ()) -> Iterator[tuple[Path, float | None]]:
    match value:
        case Mapping():
            for key, inner in value.items():
                yield from _numbers(inner, (*path, key))
        case list():
            for number, inner in enumerate(value):
                yield from _numbers(inner, (*path, number))
        case None:
            yield path, None
        case bool() | str():
            return
        case _:
            yield path, value
