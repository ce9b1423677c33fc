"""Results that take a model to make, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.invoke import succeeded
from tests.conftest import BUILTIN

# Little text, and one domain that others cannot be mistaken for.
TEXT = ("-t", "builtin:arithmetic", "-t", "js=builtin:json", "--max-tokens", "512", "--length", "64")


@pytest.fixture(scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A profile of each builtin checkpoint."""
    folder = tmp_path_factory.mktemp("profiles")
    for name in BUILTIN:
        succeeded("profile", name, "-o", folder / name.removeprefix("builtin:"), *TEXT, "--json")
    return {name: folder / name.removeprefix("builtin:") for name in BUILTIN}


@pytest.fixture(scope="session")
def top1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each builtin checkpoint with top-1 gating."""
    folder = tmp_path_factory.mktemp("top1")
    for name in BUILTIN:
        succeeded("retop", name, folder / name.removeprefix("builtin:"), "--json")
    return {name: folder / name.removeprefix("builtin:") for name in BUILTIN}


@pytest.fixture(scope="session")
def inner(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A profile of each builtin checkpoint with inner products."""
    folder = tmp_path_factory.mktemp("inner")
    for name in BUILTIN:
        succeeded("profile", name, "-o", folder / name.removeprefix("builtin:"), *TEXT, "--inner", "400")
    return {name: folder / name.removeprefix("builtin:") for name in BUILTIN}
