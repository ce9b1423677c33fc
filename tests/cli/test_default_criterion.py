"""``prune`` without ``--criterion``: which one is taken, and that it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import TEXT
from tests.cli.invoke import succeeded
from tests.conftest import BUILTIN

both = pytest.mark.parametrize("name", BUILTIN)


@pytest.fixture(scope="module")
def top1_profiles(top1: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A profile of each builtin checkpoint at top-1."""
    folder = tmp_path_factory.mktemp("top1-profiles")
    for model in top1.values():
        succeeded("profile", model, "-o", folder / model.name, *TEXT, "--json")
    return {name: folder / model.name for name, model in top1.items()}


@both
def test_a_mean_from_top_2_on(name: str, profiles: dict[str, Path], out: Path) -> None:
    report = _planned(name, profiles[name], out)
    assert report["criterion"] == "reap"
    assert report["criterion_reason"] == f"the default at top-{2 if 'mixtral' in name else 4}"
    assert report["kept"] == _planned(name, profiles[name], out, "--criterion", "reap")["kept"]


@both
def test_a_sum_at_top_1(name: str, top1: dict[str, Path], top1_profiles: dict[str, Path], out: Path) -> None:
    report = _planned(top1[name], top1_profiles[name], out)
    assert report["criterion"] == "traffic-reap"
    named = _planned(top1[name], top1_profiles[name], out, "--criterion", "traffic-reap")
    assert report["kept"] == named["kept"]
    assert "criterion_reason" not in named
    assert report["kept"] != _planned(top1[name], top1_profiles[name], out, "--criterion", "reap")["kept"]


def test_it_is_said(top1: dict[str, Path], top1_profiles: dict[str, Path], out: Path) -> None:
    name = BUILTIN[0]
    command = ("prune", top1[name], out, "--keep", "6", "--dry-run", "--profile", top1_profiles[name])
    said = " ".join(succeeded(*command).out.split())
    assert "traffic-reap (the default at top-1, where a mean per token drops experts that most tokens go to)" in said


def test_below_counts_tokens(profiles: dict[str, Path], out: Path) -> None:
    name = BUILTIN[0]
    command = ("prune", name, out, "--below", "0.1", "--dry-run", "--profile", profiles[name], "--json")
    report = succeeded(*command).json
    assert report["criterion"] == "frequency"
    assert "--below" in report["criterion_reason"]


def _planned(model: str | Path, profile: Path, out: Path, *options: str) -> dict[str, object]:
    command = ("prune", model, out, "--keep", "6", "--dry-run", "--profile", profile, *options, "--json")
    return dict(succeeded(*command).json)
