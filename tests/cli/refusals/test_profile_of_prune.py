"""Profiles that no cut can be made by: another checkpoint's, damaged ones, none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.invoke import refused
from tests.cli.refusals.places import DEEPSEEK, INPUT, MIXTRAL


def test_profile_of_another_checkpoint(out: Path, profiles: dict[str, Path], top1: dict[str, Path]) -> None:
    command = ("prune", MIXTRAL, out, "--keep", "6", "--profile")
    refused(INPUT, *command, profiles[DEEPSEEK], says=("16 experts", "profile builtin:tiny-mixtral itself"))
    other = ("prune", top1[MIXTRAL], out, "--keep", "6", "--profile", profiles[MIXTRAL])
    refused(INPUT, *other, says=("taken from another checkpoint", "itself"))


def _damages() -> dict[str, Callable[[Path], object]]:
    def facts(**changes: object) -> Callable[[Path], object]:
        def damage(folder: Path) -> None:
            path = folder / "profile.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return damage

    def sums(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
        def damage(folder: Path) -> None:
            arrays = {name: array.copy() for name, array in load_file(folder / "stats.safetensors").items()}
            change(arrays)
            save_file(arrays, folder / "stats.safetensors")

        return damage

    def truncate(folder: Path) -> None:
        path = folder / "stats.safetensors"
        path.write_bytes(path.read_bytes()[:-8])

    return {
        "no facts": lambda folder: (folder / "profile.json").unlink(),
        "no sums": lambda folder: (folder / "stats.safetensors").unlink(),
        "no JSON": lambda folder: (folder / "profile.json").write_text("{"),
        "a list": lambda folder: (folder / "profile.json").write_text("[]"),
        "nested": lambda folder: (folder / "profile.json").write_text("[" * 100_000),
        "another schema": facts(schema_version=99),
        "no layers": facts(layers=None),
        "words for experts": facts(experts="many"),
        "no origin": facts(origin={}),
        "truncated": truncate,
        "a sum is missing": sums(lambda arrays: arrays.pop("weighted_norm")),
        "a sum of another shape": sums(lambda arrays: arrays.update(weighted_norm=np.zeros((1, 2, 3)))),
        "no number": sums(lambda arrays: arrays["weighted_norm"].fill(np.nan)),
        "no count of tokens": sums(lambda arrays: arrays.pop("seen")),
    }


@pytest.mark.parametrize("damage", _damages())
def test_damaged_profile(damage: str, out: Path, tmp_path: Path, profiles: dict[str, Path]) -> None:
    folder = tmp_path / "profile"
    folder.mkdir()
    for path in profiles[MIXTRAL].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    _damages()[damage](folder)
    refused(INPUT, "prune", MIXTRAL, out, "--keep", "6", "--profile", folder, says=(str(folder), "profile"))


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_no_profile(path: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("prune", MIXTRAL, out, "--keep", "6", "--profile", tmp_path / path)
    refused(INPUT, *arguments, says=("is no profile", "make one with moesurgeon profile"))
