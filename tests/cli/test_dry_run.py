"""``--dry-run`` shows the plan that is then applied, and writes nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import TEXT
from tests.cli.invoke import contents, refused, succeeded
from tests.conftest import BUILTIN


@pytest.mark.parametrize("layout", [[], ["--layout", "fused"], ["--layout", "qwen2-moe"]], ids=["", "fused", "qwen2"])
@pytest.mark.parametrize("command", ["retop", "prune"])
@pytest.mark.parametrize("name", BUILTIN)
def test_same_plan(name: str, command: str, layout: list[str], tmp_path: Path, profiles: dict[str, Path]) -> None:
    out = tmp_path / "new" / "out"
    how = ["--top-k", "1"] if command == "retop" else ["--profile", profiles[name], "--ratio", "0.5"]
    arguments = [command, name, out, *how, *layout]
    if "qwen2-moe" in layout and name == "builtin:tiny-mixtral":
        refused(2, *arguments, "--dry-run", says=("not for Mixtral",))
        assert contents(tmp_path) == {}
        return
    planned = succeeded(*arguments, "--dry-run", "--json").json
    shown = succeeded(*arguments, "--dry-run").out
    assert contents(tmp_path) == {}  # not even the folder above
    assert f"would write {out}" in shown
    applied = succeeded(*arguments, "--json").json
    assert planned.pop("dry_run") is True and applied.pop("dry_run") is False
    assert applied.pop("shards") > 0 and applied.pop("linked_shards") == applied.pop("resumed_shards") == 0
    assert planned == applied
    report = succeeded("inspect", out, "--json").json
    assert report["bytes"] == planned["bytes_after"] and report["problems"] == []
    for key, value in planned["plan"]["config"].items():
        assert f"config: {key} " in shown, value


def test_dry_run_still_refuses(tmp_path: Path) -> None:
    refused(2, "retop", BUILTIN[0], tmp_path / "out", "--top-k", "2", "--dry-run", says=("nothing to do",))


@pytest.mark.parametrize("extra", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_an_output_that_exists_is_noted_at_most(extra: list[str], tmp_path: Path, profiles: dict[str, Path]) -> None:
    (tmp_path / "mine").touch()
    commands = {
        "retop": ["retop", BUILTIN[0], tmp_path],
        "prune": ["prune", BUILTIN[0], tmp_path, "--keep", "6", "--profile", profiles[BUILTIN[0]]],
        "stages": ["prune", BUILTIN[0], tmp_path, "--stages", "7", "--heal", "builtin:json"],
        "recover": ["recover", BUILTIN[0], tmp_path, "--teacher", BUILTIN[1], "--objective", "lm", *TEXT],
        "layers": ["recover", BUILTIN[0], tmp_path, "--teacher", BUILTIN[1], "--heal-method", "scale", "--steps", "0"],
    }
    for name in ("retop", "prune"):
        report = succeeded(*commands[name], "--dry-run", *extra, "--json").json
        assert str(tmp_path) in report["output_refused"]
        assert "note: without --dry-run this would be refused" in succeeded(*commands[name], "--dry-run", *extra).out
        refused(2, *commands[name], *extra, says=(str(tmp_path),))
    (tmp_path / "file").touch()
    succeeded("retop", BUILTIN[0], tmp_path / "file", "--dry-run", *extra)
    assert sorted(contents(tmp_path)) == ["file", "mine"]


def test_dry_run_of_recover_reads_the_text_and_trains_nothing(
    tmp_path: Path, top1: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.recover.filled", pytest.fail)
    arguments = ("recover", top1[BUILTIN[0]], tmp_path / "out", "--teacher", BUILTIN[0], *TEXT, "--dry-run")
    report = succeeded(*arguments, "--heldout-tokens", "64", "--json").json
    assert (report["tokens"], report["heldout_tokens"]) == (512, 64)
    assert report["splits"] == {"arithmetic": "calibration", "js": "calibration"}
    assert "would train on 512 and judge on 64 held-out tokens" in succeeded(*arguments, "--heldout-tokens", "64").out
    assert contents(tmp_path) == {}
