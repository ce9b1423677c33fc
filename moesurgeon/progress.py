"""How long work reports on itself without knowing who watches.

Everything below the command line takes a :class:`Progress`; the command line passes one that draws
bars, everybody else leaves the silent default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[float], None]


class Progress(Protocol):
    """Something that can show that work goes on."""

    def task(self, label: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """Open a bar of ``total`` units; the context's value is called with units done since."""
        ...

    def note(self, message: str) -> None:
        """Say one line that the user should see."""
        ...


class Silent:
    """The default: shows nothing."""

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Advance]:
        yield lambda done: None

    def note(self, message: str) -> None:
        pass


SILENT = Silent()
