"""Work in several threads ends as work in one does: all of it, or with the first error and nothing going on."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from moesurgeon.checkpoint import parallel
from moesurgeon.checkpoint.parallel import each_of
from moesurgeon.progress import Advance


def _ignored(done: float) -> None:
    pass


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_all_is_done_and_counted(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(parallel, "AT_ONCE", at_once)
    begun: list[int] = []
    moved: list[float] = []

    def work(item: int, advance: Advance) -> None:
        begun.append(item)
        for _ in range(item):
            advance(1)

    each_of(iter(range(40)), work, moved.append)
    assert sorted(begun) == list(range(40))
    assert at_once > 1 or begun == list(range(40))
    assert sum(moved) == sum(range(40))
    each_of([], work, moved.append)


def test_pieces_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)
    each_of(range(2), lambda item, advance: both.wait() and None, _ignored)


def _endless(calls: list[float]) -> Callable[[int, Advance], None]:
    def work(item: int, advance: Advance) -> None:
        while True:
            calls.append(time.monotonic())
            time.sleep(0.001)
            advance(1)

    return work


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("ours"), MemoryError(), SystemExit(3)])
def test_the_first_error_is_raised_and_ends_the_others(error: BaseException) -> None:
    calls: list[float] = []
    endless = _endless(calls)

    def work(item: int, advance: Advance) -> None:
        if item:
            while not calls:
                time.sleep(0.001)
            raise error
        endless(item, advance)

    with pytest.raises(type(error)) as raised:
        each_of(range(9), work, _ignored)
    assert raised.value is error
    _is_quiet(calls)


def test_an_error_of_the_items_or_of_who_counts_is_not_lost() -> None:
    def failing() -> object:
        yield 1
        raise ValueError("while planned")

    with pytest.raises(ValueError, match="while planned"):
        each_of(failing(), lambda item, advance: None, _ignored)

    def refuse(done: float) -> None:
        raise ValueError("while counted")

    with pytest.raises(ValueError, match="while counted"):
        each_of(range(5), lambda item, advance: advance(1), refuse)


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_ends_all_at_once_however_often_it_is_pressed(presses: int) -> None:
    calls: list[float] = []

    def press() -> None:
        for _ in range(presses):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

    slow = threading.Event()

    def work(item: int, advance: Advance) -> None:
        while True:
            calls.append(time.monotonic())
            slow.wait(0.2)  # a step that cannot be interrupted, such as fsync
            calls.append(time.monotonic())
            advance(1)

    pressing = threading.Thread(target=press)
    pressing.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        each_of(range(9), work, _ignored)
    assert time.monotonic() - began < 2
    pressing.join()
    _is_quiet(calls)


def _is_quiet(calls: list[float]) -> None:
    """Nothing goes on behind the back of who caught the error."""
    count = len(calls)
    time.sleep(0.3)
    assert len(calls) == count
    assert all(thread is threading.main_thread() or "take_turns" not in thread.name for thread in threading.enumerate())
