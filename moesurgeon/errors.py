"""The exceptions of moesurgeon and the exit code that each one ends the process with.

    MoeSurgeonError                  base: never raised itself
    |-- UsageError              2    the command line or a recipe asks for something impossible
    |   `-- NothingToDo         2    the operation would change nothing
    |-- InputError              3    something given to us cannot be used
    |   |-- CheckpointError     3    damaged, incomplete or contradictory checkpoint
    |   |   `-- UnknownFamily   3    a checkpoint of an architecture that we have no family file for
    |   |-- TraceError          3    traces that cannot be read or hold no text
    |   `-- ProfileError        3    a profile that is damaged or belongs to another checkpoint
    |-- GateFailed              4    a quality gate failed; the last good state was kept
    `-- OutputError             5    the output could not be written, or did not verify

Every message is one line: what is wrong, then what to do about it. A traceback is for bugs of ours
(exit code 1); ``MOESURGEON_DEBUG=1`` shows it for user errors as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

EXIT_OK = 0
EXIT_BUG = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_PIPE = 141  # 128 + SIGPIPE: the reader of our output went away


class MoeSurgeonError(Exception):
    """Base of all errors that are not bugs of moesurgeon; ``exit_code`` is the process's."""

    exit_code = EXIT_BUG


class UsageError(MoeSurgeonError):
    """The request makes no sense as asked (exit code 2)."""

    exit_code = 2


class NothingToDo(UsageError):
    """The operation would change nothing; ``--allow-noop`` accepts that."""


class InputError(MoeSurgeonError):
    """Something the user gave cannot be used (exit code 3)."""

    exit_code = 3


class CheckpointError(InputError):
    """The checkpoint is damaged, incomplete or contradicts itself."""


class UnknownFamily(CheckpointError):
    """No family file describes this architecture."""


class TraceError(InputError):
    """The traces cannot be read, or there is no text in them."""


class ProfileError(InputError):
    """The profile is damaged, or was taken from another checkpoint."""


class GateFailed(MoeSurgeonError):
    """A quality gate failed; what had passed before was kept (exit code 4). ``verdict``: what a report says of it."""

    exit_code = 4

    def __init__(self, message: str, verdict: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.verdict = verdict


class OutputError(MoeSurgeonError):
    """The output could not be written or did not verify (exit code 5)."""

    exit_code = 5


def and_more(names: Sequence[str]) -> str:
    """Return the first of ``names`` and how many more there are, for a message.

    >>> and_more(["a"]), and_more(["a", "b", "c"])
    ('a', 'a and 2 more')
    """
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
