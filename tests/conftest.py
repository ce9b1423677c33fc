"""Fixtures that every test may use: the two builtin checkpoints, opened once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from moesurgeon.pipeline.subject import Subject, open_subject

BUILTIN = ("builtin:tiny-mixtral", "builtin:tiny-deepseek")


@pytest.fixture(scope="session", autouse=True)
def _can_be_interrupted() -> None:
    """A shell without job control starts what runs in its background deaf to Ctrl-C, and so all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Tiny matrices gain nothing from a second thread, and wait for it (7 x) where other work runs."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=BUILTIN, ids=["mixtral", "deepseek"])
def tiny(request: pytest.FixtureRequest) -> Subject:
    """Each of the builtin checkpoints in turn."""
    return open_subject(request.param)


@pytest.fixture(scope="session")
def tiny_mixtral() -> Subject:
    return open_subject("builtin:tiny-mixtral")


@pytest.fixture(scope="session")
def tiny_deepseek() -> Subject:
    return open_subject("builtin:tiny-deepseek")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that does not exist yet, to write to."""
    return tmp_path / "out"
