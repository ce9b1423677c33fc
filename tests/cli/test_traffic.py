"""``prune`` says what traffic goes, whoever chose: on stderr, in the JSON, in a dry run, and before it heals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.profiling.artefact import load_profile
from tests.cli.invoke import moesurgeon, refused, succeeded
from tests.conftest import BUILTIN

MIXTRAL, DEEPSEEK = BUILTIN
HEAL = ("--heal", "builtin:json", "--heal-method", "none", "--heal-tokens", "1024", "--heal-heldout", "512")


def _busiest(profile: Path, layer: int = 1) -> tuple[int, int]:
    """Return the two experts with most tokens in a layer."""
    statistics = load_profile(profile).weighted
    order = statistics.total("tokens")[statistics.layers.index(layer)].argsort()
    return int(order[-1]), int(order[-2])


@pytest.fixture
def without_busiest(profiles: dict[str, Path], tmp_path: Path) -> Path:
    """A file that drops the two busiest experts of layer 1, elsewhere the last two."""
    gone = {layer: (6, 7) for layer in range(4)} | {1: _busiest(profiles[MIXTRAL])}
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({layer: [e for e in range(8) if e not in gone[layer]] for layer in gone}))
    return path


def _shares(report: dict[str, Any], profile: Path) -> None:
    """Check what the report says against the profile."""
    statistics = load_profile(profile).weighted
    shares = statistics.utilization()
    assert set(report["traffic_removed"]) == {str(layer) for layer in statistics.layers}
    for row, layer in enumerate(statistics.layers):
        found, gone = report["traffic_removed"][str(layer)], report["dropped"][str(layer)]
        assert sorted(each["expert"] for each in found["experts"]) == gone
        assert found["share"] == pytest.approx(shares[row, gone].sum())


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("criterion", ["random", "man", "reconstruction"])
def test_whatever_the_criterion(
    name: str, criterion: str, out: Path, profiles: dict[str, Path], inner: dict[str, Path]
) -> None:
    profile = (inner if criterion == "reconstruction" else profiles)[name]
    prune = ("prune", name, out, "--profile", profile, "--ratio", "0.5", "--criterion", criterion, "--dry-run")
    report = succeeded(*prune, "--json").json
    _shares(report, profile)
    much = {layer for layer, found in report["traffic_removed"].items() if found["much"]}
    shown = succeeded(*prune)
    assert {layer for layer in report["dropped"] if f"note: layer {layer}: expert " in shown.err} == much
    share = report["traffic_removed"]["1"]["share"]
    assert f"({share:.0%} of its traffic)" in shown.out
    assert not out.exists()


def test_a_file_of_experts_beside_a_profile(out: Path, profiles: dict[str, Path], without_busiest: Path) -> None:
    prune = ("prune", MIXTRAL, out, "--keep-experts", without_busiest)
    assert "traffic_removed" not in succeeded(*prune, "--dry-run", "--json").json
    told = (*prune, "--profile", profiles[MIXTRAL])
    shown = succeeded(*told, "--explain", "--dry-run")
    expert = _busiest(profiles[MIXTRAL])[0]
    assert f"note: layer 1: expert {expert} had " in shown.err and "of its traffic" in shown.out
    report = succeeded(*told, "--json").json
    _shares(report, profiles[MIXTRAL])
    assert report["criterion"] == "keep-experts" and report["traffic_removed"]["1"]["much"]
    assert any(warning.startswith(f"layer 1: expert {expert} had ") for warning in report["warnings"])
    refused(3, *prune, "--overwrite", "--profile", profiles[DEEPSEEK], says=("profile builtin:tiny-mixtral itself",))
    refused(2, *told, "--overwrite", "--curve", says=("without --keep-experts",))
    without_busiest.write_text(json.dumps({"0": [0, 1, 2]}))
    refused(3, *told, "--overwrite", says=(str(without_busiest), "layer"))


def test_it_is_said_once_and_before_healing(
    out: Path, profiles: dict[str, Path], without_busiest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = ("prune", MIXTRAL, out, "--keep-experts", without_busiest, "--profile", profiles[MIXTRAL], *HEAL)
    line = f"note: layer 1: expert {_busiest(profiles[MIXTRAL])[0]} had "
    assert succeeded(*prune).err.count(line) == 1

    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moesurgeon.pipeline.heal.Healer.heal", stops)
    stopped = moesurgeon(*prune, "--overwrite")
    assert stopped.code == 130 and line in stopped.err


def test_in_stages(out: Path, profiles: dict[str, Path], without_busiest: Path, tmp_path: Path) -> None:
    """Each stage says it of its own cut, also where a run goes on after it; a dry run of the first."""
    judged = (*HEAL, "--gate", "loss < 99", "--profile", profiles[MIXTRAL])
    prune = ("prune", MIXTRAL, out, "--keep-experts", without_busiest, *judged)
    line = f"stage-01: layer 1: expert {_busiest(profiles[MIXTRAL])[0]} had "
    planned = succeeded(*prune, "--dry-run")
    assert planned.err.count(f"note: {line}") == 1
    run = ("--run", tmp_path / "run")
    assert succeeded(*prune, *run).err.count(f"note: {line}") == 1
    again = succeeded(*prune, *run, "--overwrite")
    assert "judged before" in again.err and again.err.count(f"note: {line}") == 1
    report = succeeded(*prune, *run, "--overwrite", "--json").json
    assert report["stages"][0]["evidence"]["traffic_removed"]["1"]["much"]
    assert sum(warning.startswith(line) for warning in report["warnings"]) == 1
    scored = ("prune", MIXTRAL, out, "--stages", "7,6", "--overwrite", "--dry-run", *judged)
    stages = succeeded(*scored, "--json").json["stages"]
    assert len(stages[0]["evidence"]["traffic_removed"]["1"]["experts"]) == 1 and "evidence" not in stages[1]
