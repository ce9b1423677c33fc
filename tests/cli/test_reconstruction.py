"""``prune --criterion reconstruction`` and ``--curve`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesurgeon.profiling.artefact import load_profile
from moesurgeon.profiling.subset_errors import errors_of_subsets, routing_at
from tests.cli.invoke import contents, refused, succeeded
from tests.conftest import BUILTIN

MIXTRAL, DEEPSEEK = BUILTIN
USAGE, INPUT, OUTPUT = 2, 3, 5
both = pytest.mark.parametrize("name", BUILTIN)


@both
def test_layers_keep_what_reproduces_them_best(name: str, inner: dict[str, Path], tmp_path: Path) -> None:
    command = ("prune", name, tmp_path / "out", "--profile", inner[name], "--ratio", "0.25", "--dry-run")
    report = succeeded(*command, "--criterion", "reconstruction", "--json").json
    assert report["criterion"] == "reconstruction" and report["stability"]["tokens"] is None
    reap = succeeded(*command, "--json").json
    stored = load_profile(inner[name]).inner
    assert stored is not None and report["reconstruction"]["tokens"] == stored.shape.tokens == 400
    top_k = {MIXTRAL: 2, DEEPSEEK: 4}[name]
    for layer, said in report["reconstruction"]["layers"].items():
        for of, error in ((report, said["error"]), (reap, said["reap"])):
            mask = np.isin(np.arange(stored.shape.experts), of["kept"][layer])[None]
            found = errors_of_subsets(stored.layer(int(layer)), routing_at(stored.rule, top_k), mask, top_k)
            assert error == pytest.approx(found.relative[0], rel=1e-5)
        assert said["error"] <= said["reap"] and said["exact"]
    assert report["kept"] != reap["kept"]
    text = succeeded(*command, "--criterion", "reconstruction")
    assert "error of the layers' output on 400 tokens" in text.out and "by reap" in text.out


def test_it_is_written_with_what_it_rests_on_and_is_the_same_every_time(inner: dict[str, Path], tmp_path: Path) -> None:
    command = ("--profile", inner[MIXTRAL], "--keep", "6", "--criterion", "reconstruction", "--json")
    for name in "ab":
        succeeded("prune", MIXTRAL, tmp_path / name, *command)
    record = json.loads((tmp_path / "a" / "moesurgeon.json").read_text())
    assert '"reconstruction"' in json.dumps(record)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a" / "moesurgeon.json").read_bytes() == (tmp_path / "b" / "moesurgeon.json").read_bytes()


def test_the_count_can_come_from_the_traffic(inner: dict[str, Path], tmp_path: Path) -> None:
    command = (
        "prune",
        DEEPSEEK,
        tmp_path / "out",
        "--profile",
        inner[DEEPSEEK],
        "--below",
        "0.2",
        "--dry-run",
        "--json",
    )
    report = succeeded(*command, "--criterion", "reconstruction").json
    plain = succeeded(*command).json
    assert report["experts_after"] == plain["experts_after"] < 16
    assert report["criterion"] == "reconstruction" and "candidates" in report and "reconstruction" in report


@both
def test_a_curve_alone_needs_no_count(name: str, inner: dict[str, Path], tmp_path: Path) -> None:
    command = ("prune", name, tmp_path / "out", "--profile", inner[name], "--curve", "--dry-run")
    report = succeeded(*command, "--json").json
    experts, least = {MIXTRAL: (8, 2), DEEPSEEK: (16, 4)}[name]
    assert report["criterion"] is None and report["experts_after"] == experts
    assert all(not dropped for dropped in report["dropped"].values())
    for points in report["curve"].values():
        assert [point["experts"] for point in points] == list(range(experts, least - 1, -1))
        assert all(len(point["kept"]) == point["experts"] for point in points)
    text = succeeded(*command).out
    assert "error of the layers' output by how many experts stay" in text and "would write" not in text
    assert not (tmp_path / "out").exists()


def test_a_curve_goes_with_any_choice_and_is_drawn(inner: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    command = ("prune", MIXTRAL, tmp_path / "out", "--profile", inner[MIXTRAL], "--keep", "6")
    report = succeeded(*command, "--curve", "--curve-plot", tmp_path / "c.svg", "--json").json
    assert report["criterion"] == "reap" and report["experts_after"] == 6 and len(report["curve"]["0"]) == 7
    assert report["curve_plot"] == str(tmp_path / "c.svg") and "layer 3" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize("what", [["--keep", "6", "--criterion", "reconstruction"], ["--curve", "--dry-run"]])
def test_without_inner_products(what: list[str], profiles: dict[str, Path], tmp_path: Path) -> None:
    command = ("prune", MIXTRAL, tmp_path / "out", "--profile", profiles[MIXTRAL], *what)
    refused(INPUT, *command, says=("no inner products", "moesurgeon profile --inner 1024"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--curve"], ("give --keep N, --ratio R or --below S",)),
        (["--curve", "--dry-run", "--criterion", "ean"], ("add --keep or --ratio or --below SHARE",)),
        (["--curve", "--keep", "1", "--dry-run"], ("keep at least 2 experts",)),
        (["--curve", "--curve-plot", "curve.txt", "--dry-run"], ("curve.txt is neither .png, .svg nor .pdf",)),
        (["--keep", "1", "--criterion", "reconstruction"], ("keep at least 2 experts",)),
        (["--keep", "6", "--criterion", "reconstructed"], ("reconstruction (needs profile --inner)", "reap")),
    ],
    ids=" ".join,
)
def test_arguments(arguments: list[str], says: tuple[str, ...], inner: dict[str, Path], tmp_path: Path) -> None:
    refused(USAGE, "prune", MIXTRAL, tmp_path / "out", "--profile", inner[MIXTRAL], *arguments, says=says)


def test_a_curve_is_of_a_profile(tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text("{}")
    command = ("prune", MIXTRAL, tmp_path / "out", "--curve", "--dry-run")
    refused(USAGE, *command, "--keep-experts", tmp_path / "kept.json", says=("add --profile",))
    refused(USAGE, *command, says=("add --profile",))


def test_a_picture_that_cannot_be_written(inner: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    command = ("prune", MIXTRAL, tmp_path / "out", "--profile", inner[MIXTRAL], "--dry-run", "--curve")
    command += ("--curve-plot",)
    refused(USAGE, *command, tmp_path / "nowhere" / "c.png", says=("there is no folder",))
    (tmp_path / "c.png").write_text("mine")
    refused(USAGE, *command, tmp_path / "c.png", says=("--curve-plot", "exists", "--overwrite"))
    succeeded(*command, tmp_path / "c.png", "--overwrite")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
