"""``retop`` with a profile: collapse and errors by layer before anything is written, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesurgeon.profiling.artefact import load_profile
from moesurgeon.profiling.statistics import normalised_entropy, shares
from moesurgeon.profiling.subset_errors import errors_of_subsets, routing_at
from tests.cli.invoke import contents, moesurgeon, refused, succeeded
from tests.conftest import BUILTIN

MIXTRAL, DEEPSEEK = BUILTIN
USAGE, INPUT, OUTPUT = 2, 3, 5
both = pytest.mark.parametrize("name", BUILTIN)


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    """A server's counts for the Mixtral checkpoint."""
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({str(layer): [100] * 8 for layer in range(4)}))
    succeeded("profile", "import", file, "-o", tmp_path / "counts", "--checkpoint", MIXTRAL)
    return tmp_path / "counts"


@both
def test_collapse_is_told_before_anything_is_written(name: str, profiles: dict[str, Path], tmp_path: Path) -> None:
    command = ("retop", name, tmp_path / "out", "--profile", profiles[name], "--dry-run")
    report = succeeded(*command, "--json").json
    statistics = load_profile(profiles[name]).statistics
    first = shares(statistics.total("first_choice"))
    for row, (layer, figures) in enumerate(report["collapse"].items()):
        assert int(layer) == statistics.layers[row]
        assert figures["entropy"] == pytest.approx(float(normalised_entropy(first[row])))
        assert {"max_over_mean", "as_is", "unused", "starved", "overflow", "collapsed"} < set(figures)
        assert set(figures["overflow"]["512"]) == {"1", "1.25", "1.5", "2"}
    assert "per_layer" not in report and "rather" not in report
    shown = succeeded(*command)
    assert "routing as it is and as top-1" in shown.out and "capacity factor" in shown.out
    for warning in report["warnings"]:
        assert f"note: {warning}" in shown.err
    assert contents(tmp_path) == {}


def test_layers_that_would_collapse_are_named(profiles: dict[str, Path], tmp_path: Path) -> None:
    """In a profile in which all first choices of a layer go one way."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "profile"
    folder.mkdir()
    for path in profiles[MIXTRAL].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    arrays = {name: array.copy() for name, array in load_file(folder / "stats.safetensors").items()}
    first = arrays["first_choice"]
    first[:, :, 2, 5] = first[:, :, 2].sum(axis=-1)
    first[:, :, 2, [0, 1, 2, 3, 4, 6, 7]] = 0
    save_file(arrays, folder / "stats.safetensors")
    report = succeeded("retop", MIXTRAL, tmp_path / "out", "--profile", folder, "--json").json
    assert report["collapse"]["2"]["collapsed"] and report["collapse"]["2"]["unused"] == [0, 1, 2, 3, 4, 6, 7]
    assert any("layer 2 would be collapsed: top-1 has 0.00 of" in warning for warning in report["warnings"])
    shown = succeeded("retop", MIXTRAL, tmp_path / "again", "--profile", folder)
    assert "note: layer 2 would be collapsed" in shown.err and "2 *" in shown.out


@both
def test_errors_by_layer(name: str, inner: dict[str, Path], tmp_path: Path) -> None:
    command = ("retop", name, tmp_path / "out", "--profile", inner[name], "--per-layer")
    report = succeeded(*command, "--json").json
    stored = load_profile(inner[name]).inner
    assert stored is not None
    most = {MIXTRAL: 2, DEEPSEEK: 4}[name]
    everyone = np.ones((1, stored.shape.experts), dtype=bool)
    for layer, found in report["per_layer"].items():
        for k in range(1, most + 1):
            errors = errors_of_subsets(stored.layer(int(layer)), routing_at(stored.rule, k), everyone, k)
            assert found["errors"][str(k)] == pytest.approx(errors.relative[0], rel=1e-5, abs=1e-7)
            assert found["scaled"][str(k)] <= found["errors"][str(k)]
    assert isinstance(report["rather"], list) and "divided" not in report
    plain = succeeded("retop", name, tmp_path / "plain", "--json").json
    assert plain["plan"] == report["plan"]  # it is a report
    assert contents(tmp_path / "plain") == contents(tmp_path / "out")
    assert "error of the layers' output by experts per token" in succeeded(*command, "--overwrite").out


def test_a_budget_is_divided_and_written(inner: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "k.json"
    command = ("retop", MIXTRAL, tmp_path / "out", "--profile", inner[MIXTRAL])
    budget = ("--per-layer-average", "1.5", "--per-layer-out", file)
    planned = succeeded(*command, *budget, "--dry-run", "--json").json
    assert planned["per_layer_out"] == str(file) and contents(tmp_path) == {}
    assert f"would write {file}" in succeeded(*command, *budget, "--dry-run").out
    report = succeeded(*command, *budget, "--json").json
    assert report["divided"] == planned["divided"]
    assert json.loads(file.read_text()) == {"top_k": report["divided"]["top_k"]}
    found = report["divided"]
    assert sum(found["top_k"].values()) == 6 and set(found["top_k"]) == set(report["per_layer"])
    chosen = [report["per_layer"][layer]["errors"][str(k)] for layer, k in found["top_k"].items()]
    assert found["error"] == pytest.approx(np.mean(chosen)) and found["error"] < found["uniform"]["1"]
    again = ("retop", MIXTRAL, tmp_path / "again", *command[3:], *budget)
    succeeded(*again, "--dry-run")
    refused(USAGE, *again, says=(f"{file} exists", "--overwrite"))
    shown = succeeded(*command, *budget, "--overwrite")
    assert f"wrote {file}" in shown.out and "1.5 experts per token on average" in shown.out


def test_it_goes_with_healing(inner: dict[str, Path], tmp_path: Path) -> None:
    command = ("retop", MIXTRAL, tmp_path / "out", "--profile", inner[MIXTRAL], "--per-layer")
    heal = ("--calibrate", "builtin:json", "--heal-method", "scale", "--heal-tokens", "256", "--heal-heldout", "256")
    report = succeeded(*command, *heal, "--json").json
    assert report["per_layer"] and report["collapse"] and len(report["healing"]) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--per-layer"], ("add --profile", "profile --inner")),
        (["--per-layer-average", "1.5"], ("add --profile",)),
        (["--per-layer-out", "k.json"], ("add --per-layer-average",)),
        (["--profile", "nowhere", "--per-layer-out", "k.json"], ("add --per-layer-average",)),
        (["--profile", "nowhere", "--per-layer-average", "2.5"], ("2.5 is not between 1 and the checkpoint's 2",)),
        (["--profile", "nowhere", "--per-layer-average", "nan"], ("nan is no finite number",)),
    ],
    ids=" ".join,
)
def test_arguments(arguments: list[str], says: tuple[str, ...], tmp_path: Path) -> None:
    refused(USAGE, "retop", MIXTRAL, tmp_path / "out", *arguments, says=says)
    assert contents(tmp_path) == {}


def test_places_that_are_not_for_the_budget(inner: dict[str, Path], top1: dict[str, Path], tmp_path: Path) -> None:
    command = ("retop", MIXTRAL, tmp_path / "out", "--profile", inner[MIXTRAL], "--per-layer-average", "1.5")
    refused(
        USAGE,
        *command,
        "--per-layer-out",
        tmp_path / "out" / "k.json",
        says=(
            "lies in",
            "choose another place",
        ),
    )
    refused(USAGE, *command, "--per-layer-out", tmp_path / "nowhere" / "k.json", says=("there is no folder",))
    refused(USAGE, *command, "--overwrite", "--per-layer-out", tmp_path, says=("exists",))
    assert contents(tmp_path) == {}


def test_profiles_that_do_not_serve(
    inner: dict[str, Path], profiles: dict[str, Path], top1: dict[str, Path], counts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("retop", MIXTRAL, out, "--profile")
    refused(INPUT, *command, inner[DEEPSEEK], says=("16 experts", "profile builtin:tiny-mixtral itself"))
    other = ("retop", top1[MIXTRAL], out, "--allow-noop", "--profile", inner[MIXTRAL])
    refused(INPUT, *other, says=("taken from another checkpoint",))
    refused(INPUT, *command, tmp_path / "nowhere", says=("is no profile",))
    refused(INPUT, *command, profiles[MIXTRAL], "--per-layer", says=("no inner products", "profile --inner"))
    refused(INPUT, *command, counts, says=("a server's counts", "or leave out --profile"))
    unchanged = (*command, counts, "--top-k", "2", "--allow-noop", "--dry-run")
    refused(INPUT, *unchanged, "--per-layer", says=("a server's counts",))
    assert succeeded(*unchanged, "--json").json["collapse"]["0"]["entropy"] == pytest.approx(1.0)
    assert not out.exists()


def test_without_a_profile_nothing_is_foreseen(tmp_path: Path) -> None:
    report = succeeded("retop", MIXTRAL, tmp_path / "out", "--json").json
    assert report["warnings"] == [] and not {"collapse", "per_layer", "divided"} & set(report)
    assert report["renormalises"] == {"before": True, "after": True}
    assert moesurgeon("retop", MIXTRAL, tmp_path / "out", "--json", "--overwrite").err == ""
