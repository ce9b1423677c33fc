"""What every refusal leaves: nothing. And the checkpoints that cannot be used, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.broken import CONTRADICTORY, UNREADABLE
from tests.cli.invoke import contents


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path: Path) -> Iterator[None]:
    """Whatever a test here does, there is nothing new below its output folder."""
    folder = tmp_path / "written"
    folder.mkdir()
    yield
    assert contents(folder) == {}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "written" / "out"


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a checkpoint of ``broken.py`` by its name, made on first use."""
    folder = tmp_path_factory.mktemp("broken")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder / name
            (UNREADABLE.get(name) or CONTRADICTORY[name])[0](made[name])
        return made[name]

    return get
