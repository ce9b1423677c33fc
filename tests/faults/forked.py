"""Writers as processes of their own, without the price of starting an interpreter."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable

FAILED = 17


def forked(work: Callable[[], object]) -> int:
    """Run ``work`` in a child and return its process id; the child ends with 0, or FAILED if it raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads; the children do not use it
        child = os.fork()
    if child:
        return child
    signal.alarm(60)  # should the parent go away
    try:
        work()
    except BaseException:  # noqa: BLE001 - the code tells, and nothing of the test runner may run here
        os._exit(FAILED)
    os._exit(0)


def ended(child: int) -> int:
    """Wait for ``child`` and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int, after: float, sign: signal.Signals = signal.SIGKILL) -> int:
    """Send ``sign`` after some seconds, and return what the child ended with."""
    time.sleep(after)
    os.kill(child, sign)
    return ended(child)


def kill_at(target: object, name: str, call: int) -> Callable[[], None]:
    """Patch ``target.name`` in a child so that it dies just after the given call of it."""

    def prepare() -> None:
        real, calls = getattr(target, name), [0]

        def dying(*args: object, **kwargs: object) -> object:
            result = real(*args, **kwargs)
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), 9)
            return result

        setattr(target, name, dying)

    return prepare
