"""Which text to read: the command line form ``[NAME=]LOCATION[:COLUMN]`` and what it stands for.

LOCATION is ``builtin:NAME``, a file, a folder of files, or a folder saved by ``datasets``; ``FOLDER/*`` stands for
one of these for each entry of the folder. Each trace is one domain of the results, so its name is in every table and
every artefact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moesurgeon.errors import TraceError, UsageError
from moesurgeon.traces.builtin import BUILTIN_TRACES
from moesurgeon.traces.files import READABLE, is_trace, unreadable

_BUILTIN = "builtin:"
_ALL = "builtin:all"
_EACH = re.compile(r"(.+)/\*(:[^/]*)?", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # safe in file names, JSON keys and gate expressions
RESERVED = {
    "all": "tables show all domains together under it",
    "long-context": "--protect has its own meaning for it",
    "first-choice": "--protect has its own meaning for it",
    "low-support": "--protect has its own meaning for it",
}
"""Names that no domain can have, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSpec:
    """One trace: the ``domain`` it is reported as, where its text is, and the column to read.

    ``column`` is None for plain text and builtin traces, and where the usual columns are to be tried.
    """

    domain: str
    location: str
    column: str | None = None

    @property
    def builtin(self) -> str | None:
        """The name of the builtin trace, or None if ``location`` is a path."""
        return self.location.removeprefix(_BUILTIN) if self.location.startswith(_BUILTIN) else None


def parse_trace(text: str) -> TraceSpec:
    """Return the trace that ``text``, ``[NAME=]LOCATION[:COLUMN]``, asks for.

    Paths may contain ``=`` and ``:``: the longest reading of ``text`` that exists on disk wins, so
    ``lang=de/a.jsonl`` is a path if there is such a file, and the trace ``lang`` if there is not.

    Raises UsageError for a name that cannot be used and for an unknown builtin trace, TraceError if
    there is no such file.

    >>> parse_trace("builtin:python")
    TraceSpec(domain='python', location='builtin:python', column=None)
    >>> parse_trace("code=builtin:python").domain
    'code'
    """
    located = _locate(text)
    if located is not None:
        return _spec(None, *located, text)
    name, equals, rest = text.partition("=")
    located = _locate(rest) if equals else None
    if located is not None:
        return _spec(name, *located, text)
    raise TraceError(
        f"no such file or folder: {text!r}: give [NAME=]PATH[:COLUMN], or one of the builtin traces such as builtin:all"
    )


def parse_traces(texts: Sequence[str]) -> tuple[TraceSpec, ...]:
    """Return the traces that ``texts`` ask for, in order; ``builtin:all`` stands for all of those.

    ``FOLDER/*`` stands for its sub-folders and readable files, each of them a domain. Raises what
    :func:`parse_trace` raises, and UsageError if two traces have the same domain.
    """
    expanded: list[str] = []
    for text in texts:
        expanded += [_BUILTIN + name for name in BUILTIN_TRACES] if text == _ALL else _each(text)
    specs: dict[str, TraceSpec] = {}
    for text in expanded:
        spec = parse_trace(text)
        if spec.domain in specs:
            raise UsageError(
                f"two traces are called {spec.domain!r} ({specs[spec.domain].location} and "
                f"{spec.location}): give each a name of its own, as in NAME={spec.location}"
            )
        specs[spec.domain] = spec
    return tuple(specs.values())


def _each(text: str) -> list[str]:
    """Return the traces that ``FOLDER/*[:COLUMN]`` stands for; of anything else itself."""
    found = _EACH.fullmatch(text)
    if found is None or _exists(text):
        return [text]
    folder, column = Path(found[1]).expanduser(), found[2] or ""
    if not _exists(found[1]) and _exists(found[1].partition("=")[2]):
        raise UsageError(f"{text!r} stands for several domains and cannot have one name: leave out NAME=")
    try:
        if not folder.is_dir():
            raise TraceError(f"{folder}: no such folder: give FOLDER/* for each of its sub-folders and files")
        children = [
            child
            for child in sorted(folder.iterdir())
            if is_trace(child, folder) or (child.is_dir() and not child.name.startswith("."))
        ]
    except OSError as error:
        raise unreadable(folder, error) from error
    if not children:
        raise TraceError(f"{folder}: a folder without traces: give {READABLE}")
    return [f"{child}{column}" for child in children]


def _locate(text: str) -> tuple[str, str | None] | None:
    """Return (location, column) if ``text`` is a builtin or leads to something on disk, else None."""
    if text.startswith(_BUILTIN):
        return text, None
    if _exists(text):
        return str(Path(text).expanduser()), None
    path, colon, column = text.rpartition(":")
    if colon and _exists(path):
        return str(Path(path).expanduser()), column
    return None


def _exists(path: str) -> bool:
    # expanduser because the shell leaves the tilde of NAME=~/file alone. An empty path would be ".".
    try:
        return path != "" and Path(path).expanduser().exists()
    except PermissionError as error:
        raise TraceError(
            f"{path} cannot be looked at (permission denied): change the permissions of its folder, or give another "
            "trace"
        ) from error
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null character
        return False


def _spec(name: str | None, location: str, column: str | None, text: str) -> TraceSpec:
    if column == "":
        raise UsageError(f"no column after the last colon of {text!r}: give PATH:COLUMN, or PATH alone")
    if location == _ALL:
        raise UsageError("builtin:all stands for several domains and cannot have one name: leave out NAME=")
    spec = TraceSpec(domain=_default_domain(location) if name is None else name, location=location, column=column)
    if spec.builtin is not None and spec.builtin not in BUILTIN_TRACES:
        known = ", ".join([*BUILTIN_TRACES, "all"])
        raise UsageError(f"there is no builtin trace {spec.builtin!r}: choose one of {known}")
    if not _NAME.fullmatch(spec.domain):
        raise UsageError(
            f"{spec.domain!r} cannot be a domain's name (letters, digits and _ . - only): "
            f"give one, as in NAME={location}"
        )
    if spec.domain in RESERVED:
        raise UsageError(
            f"{spec.domain!r} cannot be a domain's name, {RESERVED[spec.domain]}: give another, as in NAME={location}"
        )
    return spec


def _default_domain(location: str) -> str:
    """Return the name that a location without NAME= gets.

    >>> _default_domain("builtin:json"), _default_domain("/data/chat.v2.jsonl.gz")
    ('json', 'chat.v2')
    """
    if location.startswith(_BUILTIN):
        return location.removeprefix(_BUILTIN)
    path = Path(location)
    if path.is_dir():  # the dot in v1.5 starts no suffix; "." has no name until it is made absolute
        return path.absolute().name
    return Path(path.name.removesuffix(".gz")).stem
