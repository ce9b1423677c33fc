"""``prune --virtual``: experts out of reach, in each layer as many as it can spare."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moesurgeon.pipeline.subject import open_subject
from tests.cli.invoke import refused, succeeded
from tests.conftest import BUILTIN
from tests.families.factory import save_checkpoint

USAGE, INPUT = 2, 3
LAYERS = ("1", "2", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3 without routing groups, 8 experts in layers 1 to 3, that can read."""
    folder = tmp_path_factory.mktemp("v3") / "model"
    save_checkpoint(folder, "deepseek_v3", vocab_size=2048, n_group=1, topk_group=1, num_nextn_predict_layers=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(open_subject("builtin:tiny-deepseek").root / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "profile"
    text = ("-t", "builtin:json", "-t", "builtin:python", "--max-tokens", "2048", "--inner", "256")
    succeeded("profile", model, "-o", folder, *text, "--json")
    return folder


@pytest.mark.parametrize("budget", [("--ratio", "0.3"), ("--keep", "6")])
def test_layers_lose_what_they_can_spare(model: Path, profile: Path, out: Path, budget: tuple[str, str]) -> None:
    prune = ("prune", model, out, "--virtual", "--profile", profile, *budget)
    planned = succeeded(*prune, "--dry-run", "--json").json
    report = succeeded(*prune, "--json").json
    assert planned["kept"] == report["kept"] and report["virtual"]
    assert report["experts_before"] == report["experts_after"] == 8
    assert report["bytes_before"] == report["bytes_after"]
    dropped = {layer: len(experts) for layer, experts in report["dropped"].items()}
    assert sum(dropped.values()) == {"--ratio": 7, "--keep": 6}[budget[0]]
    assert all(sorted((*report["kept"][layer], *report["dropped"][layer])) == list(range(8)) for layer in LAYERS)
    (note,) = (warning for warning in report["warnings"] if "virtually" in warning)
    assert "no byte is saved" in note
    assert report["stability"] is not None and 0 <= report["stability"]["worst"] <= 1
    assert report["destinations"]["from"] == "inner"
    assert report["plan"]["tensors"]["transform"] == sum(count > 0 for count in dropped.values())
    # Nobody is given to those that went, and everybody else is as stored.
    usage = succeeded(
        "profile", out, "-o", out.parent / "usage", "-t", "builtin:json", "--max-tokens", "1024", "--json"
    )
    for layer in LAYERS:
        assert set(report["dropped"][layer]) <= set(usage.json["layers"][layer]["never_routed"])
    verified = succeeded("verify", out, "--source", model, "--json").json
    assert verified["tensors_equal"] == verified["tensors"]
    (operation,) = verified["history"][0]
    assert operation["operation"] == "virtual-prune" and operation["criterion"] == "reap"
    assert operation["dropped"] == {layer: experts for layer, experts in report["dropped"].items() if experts}
    card = (out / "README.md").read_text()
    assert "`virtual-prune`" in card
    shown = succeeded(*prune, "--dry-run", "--overwrite", "--explain").out
    assert "of 8 experts per layer can be chosen, by reap" in shown and "goes to" in shown


def test_counts_differ_and_protection_is_respected(model: Path, profile: Path, out: Path) -> None:
    prune = (
        "prune",
        model,
        out,
        "--virtual",
        "--profile",
        profile,
        "--ratio",
        "0.3",
        "--criterion",
        "random",
        "--dry-run",
    )
    reports = [succeeded(*prune, "--seed", str(seed), "--json").json for seed in range(3)]
    assert any(len({len(experts) for experts in report["kept"].values()}) > 1 for report in reports)
    report = succeeded(*prune, "--protect", "json=0.9", "--json").json
    assert report["protection"]["names"] == {"json": 0.9}
    for layer, found in report["protection"]["layers"].items():
        assert {claim["expert"] for claim in found["protected"]} - set(found["went"]) <= set(report["kept"][layer])
        assert not found["went"]
    assert any(found["kept_instead"] for found in report["protection"]["layers"].values())


def test_below_takes_who_is_cold_wherever_it_is(model: Path, profile: Path, out: Path) -> None:
    prune = ("prune", model, out, "--virtual", "--profile", profile, "--below")
    figures = succeeded("profile", "show", profile, "--json").json["layers"]
    below = 0.15
    cold = {
        layer: [expert for expert, share in enumerate(figures[layer]["utilization"]) if 2 * share < below]
        for layer in LAYERS
    }
    assert any(cold.values())
    report = succeeded(*prune, str(below), "--dry-run", "--json").json
    assert report["criterion"] == "frequency" and report["dropped"] == cold
    refused(USAGE, *prune, "0.000001", says=("nothing to prune", "raise --below"))
    assert succeeded(*prune, "0.000001", "--dry-run", "--json").json["dropped"] == {layer: [] for layer in LAYERS}


def test_lists_of_any_length(model: Path, out: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    prune = ("prune", model, out, "--virtual", "--keep-experts", kept)
    kept.write_text(json.dumps({"1": [7, 0], "2": [0, 1, 2, 3, 4, 5, 6], "3": list(range(8))}))
    refused(INPUT, *prune[:3], *prune[4:], says=("layers keep different counts",))  # without --virtual
    report = succeeded(*prune, "--json").json
    assert report["dropped"] == {"1": [1, 2, 3, 4, 5, 6], "2": [7], "3": []}
    assert report["kept"]["1"] == [0, 7] and report["criterion"] == "keep-experts"
    kept.write_text(json.dumps({"1": [7], "2": [0, 1], "3": [0, 1]}))
    refused(INPUT, *prune, "--overwrite", says=(str(kept), "layer 1 keeps 1 experts; keep at least 2"))
    kept.write_text(json.dumps({"1": list(range(8)), "2": list(range(8)), "3": list(range(8))}))
    refused(USAGE, *prune, "--overwrite", says=("nothing to prune",))
    # Who is out of reach cannot come back.
    kept.write_text(json.dumps({"1": [0, 1, 7], "2": [0, 1], "3": [0, 1]}))
    refused(INPUT, "prune", out, tmp_path / "again", *prune[3:], says=("expert 1 out of reach already",))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("method", ["ridge", "distill"])
def test_it_can_be_healed(model: Path, profile: Path, out: Path, method: str) -> None:
    """The healing block routes as the model does: past those that are out of reach."""
    heal = ("--heal", "builtin:json", "--heal-method", method, "--heal-tokens", "2048")
    heal += ("--heal-steps", "4") if method == "distill" else ()
    report = succeeded(
        "prune", model, out, "--virtual", "--profile", profile, "--ratio", "0.4", *heal, "--dtype", "float32", "--json"
    ).json
    assert [layer["layer"] for layer in report["healing"]] == [1, 2, 3]
    assert any(layer["healed_error"] < layer["error"] for layer in report["healing"])
    verified = succeeded("verify", out, "--source", model, "--json").json
    operations = [operation["operation"] for operation in verified["history"][0]]
    assert operations == ["virtual-prune", *(["heal"] if report["healed"]["kept"] else [])]
    usage = succeeded("profile", out, "-o", out.parent / "usage", "-t", "builtin:json", "--max-tokens", "512", "--json")
    for layer in LAYERS:
        assert set(report["dropped"][layer]) <= set(usage.json["layers"][layer]["never_routed"])


@pytest.mark.parametrize("name", BUILTIN)
def test_without_a_bias(name: str, out: Path, profiles: dict[str, Path]) -> None:
    prune = ("prune", name, out, "--virtual", "--keep", "6", "--profile", profiles[name])
    refused(USAGE, *prune, says=("needs a bias", "leave --virtual out"))
    refused(USAGE, *prune[:4], "--keep-experts", "nowhere.json", says=("needs a bias",))


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (("--keep", "1"), ("keep at least 2 experts per layer on average",)),
        (("--keep", "9"), ("cannot keep 9",)),
        (("--keep", "8"), ("nothing to prune",)),
        (("--ratio", "0.01"), ("of 24 experts is less than one",)),
        (("--ratio", "0.9"), ("at most 0.75 can go",)),
        (("--ratio", "0.5", "--keep", "6"), ("one of them",)),
        (("--keep", "6", "--criterion", "nonsense"), ("--criterion nonsense", "choose one of frequency")),
    ],
)
def test_budgets(model: Path, profile: Path, out: Path, budget: tuple[str, ...], says: tuple[str, ...]) -> None:
    refused(USAGE, "prune", model, out, "--virtual", "--profile", profile, *budget, says=says)
    assert not out.exists()
