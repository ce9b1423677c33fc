"""What is done with profiles: shown, merged, compared, imported, and what they say of a cut."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from moesurgeon.profiling.artefact import load_profile
from moesurgeon.profiling.rows import COLUMNS
from tests.cli.invoke import contents, refused, succeeded
from tests.conftest import BUILTIN

MIXTRAL, DEEPSEEK = BUILTIN
USAGE, INPUT, OUTPUT = 2, 3, 5
both = pytest.mark.parametrize("name", BUILTIN)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the first checkpoint on other text."""
    folder = tmp_path_factory.mktemp("other") / "profile"
    succeeded(
        "profile", MIXTRAL, "-o", folder, "-t", "builtin:prose", "--max-tokens", "512", "--length", "64", "--json"
    )
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, profiles: dict[str, Path]) -> tuple[Path, Path]:
    """The first checkpoint with two experts less, and its profile on the same text."""
    folder = tmp_path_factory.mktemp("pruned")
    succeeded("prune", MIXTRAL, folder / "once", "--profile", profiles[MIXTRAL], "--keep", "7", "--json")
    choice = folder / "kept.json"
    choice.write_text(json.dumps({layer: [6, 5, 4, 2, 1, 0][::-1] for layer in range(4)}))
    succeeded("prune", folder / "once", folder / "twice", "--keep-experts", choice, "--json")
    text = ("-t", "builtin:arithmetic", "-t", "js=builtin:json", "--max-tokens", "512", "--length", "64")
    succeeded("profile", folder / "twice", "-o", folder / "profile", *text, "--json")
    return folder / "twice", folder / "profile"


@both
def test_show(name: str, profiles: dict[str, Path]) -> None:
    report = succeeded("profile", "show", profiles[name], "--json").json
    summary = load_profile(profiles[name]).summary()
    assert report["tokens"] == 512 and report["fingerprint"] == summary["fingerprint"]
    for layer, figures in report["layers"].items():
        coldest = figures.pop("coldest")
        assert figures == summary["layers"][layer]
        assert coldest[0]["share"] == min(figures["utilization"])
        assert len(coldest[0]["interval"]) == 2
    assert report["warnings"] == summary["warnings"]
    shown = succeeded("profile", "show", profiles[name]).out
    for heading in ("utilization", "entropy", "max/mean", "CV", "Gini", "coldest", "95 % interval", "serves most"):
        assert heading in shown
    assert "choices that overflow, by capacity factor, in dispatches of 512 tokens" in shown
    assert "1.25 top-1" in shown
    assert shown.count("warning: ") == len(report["warnings"]) > 0


@both
def test_show_a_layer(name: str, profiles: dict[str, Path]) -> None:
    report = succeeded("profile", "show", profiles[name], "--layer", "2", "--json").json
    experts = report["layer"]["experts"]
    assert report["layer"]["number"] == 2
    assert sorted(expert["expert"] for expert in experts) == list(range(report["experts"]))
    assert sum(expert["share"] for expert in experts) == pytest.approx(1)
    shown = succeeded("profile", "show", profiles[name], "--layer", "2").out
    for heading in ("gate mass", "top-1", "REAP", "peak", "arithmetic", "js", "niche"):
        assert heading in shown
    refused(USAGE, "profile", "show", profiles[name], "--layer", "9", says=("--layer 9", "it has layers"))


def test_show_writes_a_spreadsheet(tmp_path: Path, profiles: dict[str, Path]) -> None:
    path = tmp_path / "a.csv"
    assert f"wrote {path}" in succeeded("profile", "show", profiles[MIXTRAL], "--csv", path).out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 4 * 8  # domains, layers, experts; all text is in the first bucket of positions
    assert sum(int(row["tokens"]) for row in rows) == 512 * 2 * 4
    nowhere = tmp_path / "nowhere" / "a.csv"
    refused(USAGE, "profile", "show", profiles[MIXTRAL], "--csv", nowhere, says=("there is no folder",))
    path.write_text("mine")
    refused(USAGE, "profile", "show", profiles[MIXTRAL], "--csv", path, says=("exists", "--overwrite"))
    assert path.read_text() == "mine"
    succeeded("profile", "show", profiles[MIXTRAL], "--csv", path, "--overwrite")
    facts = profiles[MIXTRAL] / "profile.json"
    show = ("profile", "show", profiles[MIXTRAL], "--csv", facts, "--overwrite")
    before = facts.read_bytes()
    refused(USAGE, *show, says=("lies in", "choose another place"))
    assert facts.read_bytes() == before
    assert path.read_text() != "mine" and list(tmp_path.iterdir()) == [path]


def test_what_is_not_installed_is_said_before_anything_is_written(
    tmp_path: Path, profiles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    show = ("profile", "show", profiles[MIXTRAL], "--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.png")
    refused(USAGE, *show, says=("matplotlib", "pip install 'moesurgeon[plot]'"))
    assert list(tmp_path.iterdir()) == []


def test_show_draws(tmp_path: Path, profiles: dict[str, Path]) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    report = succeeded("profile", "show", profiles[MIXTRAL], "--plot", tmp_path / "a.png", "--json").json
    assert Path(report["plot"]).read_bytes().startswith(b"\x89PNG")
    refused(USAGE, "profile", "show", profiles[MIXTRAL], "--plot", tmp_path / "a.gif", says=("neither .png nor .svg",))


def test_merge(out: Path, profiles: dict[str, Path], other: Path) -> None:
    report = succeeded("profile", "merge", profiles[MIXTRAL], other, "-o", out, "--json").json
    assert report["domains"] == {"arithmetic": 256, "js": 256, "prose": 512}
    assert report["tokens"] == load_profile(out).statistics.seen.sum() == 1024
    shown = succeeded("profile", "merge", other, profiles[MIXTRAL], "-o", out, "--overwrite").out
    assert "1,024 tokens" in shown and f"wrote {out}" in shown
    # What is merged is a profile as any other.
    assert succeeded("prune", MIXTRAL, out.with_name("pruned"), "--profile", out, "--keep", "6", "--json").json["kept"]


def test_merge_refuses_what_does_not_add_up(out: Path, profiles: dict[str, Path], other: Path) -> None:
    mine = profiles[MIXTRAL]
    before = contents(out.parent)
    refused(INPUT, "profile", "merge", mine, profiles[DEEPSEEK], "-o", out, says=("different checkpoints",))
    refused(INPUT, "profile", "merge", mine, other, mine, "-o", out, says=("the same text", "count twice"))
    refused(USAGE, "profile", "merge", mine, "-o", out, says=("nothing to merge",))
    refused(USAGE, "profile", "merge", mine, other, "-o", other, "--overwrite", says=("overlap",))
    refused(INPUT, "profile", "merge", mine, out, "-o", out, says=("is no profile",))
    assert contents(out.parent) == before


def test_diff(profiles: dict[str, Path], other: Path) -> None:
    report = succeeded("profile", "diff", profiles[MIXTRAL], other, "--json").json
    assert report["experts"] == [8, 8] and report["tokens"] == [512, 512] and not report["same_text"]
    for layer in report["layers"].values():
        assert 0 <= layer["total_variation"] <= 1 and layer["domains"] == {}
        assert [len(expert["share"]) for expert in layer["experts"]] == [2] * 8
    shown = succeeded("profile", "diff", profiles[MIXTRAL], other).out
    for heading in ("entropy", "max/mean", "moved", "significant", "experts whose traffic changed most"):
        assert heading in shown
    same = succeeded("profile", "diff", other, other, "--json").json
    assert same["same_text"] and same["significant"] == 0


def test_diff_of_what_was_pruned(profiles: dict[str, Path], pruned: tuple[Path, Path]) -> None:
    checkpoint, profile = pruned
    before = profiles[MIXTRAL]
    report = succeeded("profile", "diff", before, profile, "--checkpoint", checkpoint, "--json").json
    assert report["experts"] == [8, 6] and report["compared"] == 4 * 6
    history = json.loads((checkpoint / "moesurgeon.json").read_text())["history"]
    maps = [step["operations"][0]["expert_map"] for step in history]
    old, new = (load_profile(path).statistics.utilization() for path in (before, profile))
    for row, (layer, figures) in enumerate(report["layers"].items()):
        for expert in figures["experts"]:
            number = maps[1][layer].get(str(maps[0][layer].get(str(expert["expert"]))))
            assert expert["after"] == number
            assert expert["share"] == pytest.approx(
                [old[row, expert["expert"]], 0.0 if number is None else new[row, number]]
            )
    shown = succeeded("profile", "diff", before, profile, "--checkpoint", checkpoint).out
    assert "8 experts were dropped; they had" in shown
    refused(INPUT, "profile", "diff", before, profile, says=("8 experts", "6", "--checkpoint"))
    says = ("was not taken from builtin:tiny-mixtral",)
    refused(INPUT, "profile", "diff", before, profile, "--checkpoint", MIXTRAL, says=says)
    says = ("was not made from the checkpoint",)
    refused(INPUT, "profile", "diff", profile, profile, "--checkpoint", checkpoint, says=says)
    refused(INPUT, "profile", "diff", before, profiles[DEEPSEEK], says=("compare profiles of one model",))


def test_import(tmp_path: Path, out: Path, profiles: dict[str, Path]) -> None:
    """Counts of the profile itself lead to the choice that the profile leads to."""
    tokens = load_profile(profiles[MIXTRAL]).statistics.total("tokens")
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({str(layer): row for layer, row in enumerate(tokens.tolist())}))
    report = succeeded("profile", "import", counts, "-o", out, "--checkpoint", MIXTRAL, "--json").json
    assert report["counts_only"] and report["tokens"] == 512
    again = ("profile", "import", counts, "-o", out, "--checkpoint", MIXTRAL)
    refused(USAGE, *again, says=("--overwrite",))
    assert "--criterion frequency" in succeeded(*again, "--overwrite").out
    assert "a server's token counts" in succeeded("profile", "show", out).out
    assert "REAP" in succeeded("profile", "show", out, "--layer", "1").out
    by_count = ("prune", MIXTRAL, tmp_path / "a", "--keep", "6", "--dry-run", "--criterion", "frequency", "--json")
    reports = [succeeded(*by_count, "--profile", path).json for path in (out, profiles[MIXTRAL])]
    assert reports[0]["kept"] == reports[1]["kept"]
    assert reports[0]["stability"] is None and "too few documents" in reports[0]["warnings"][0]
    prune = ("prune", MIXTRAL, tmp_path / "a", "--keep", "6", "--profile", out)
    refused(INPUT, *prune, says=("token counts only", "say nothing of reap", "--criterion frequency"))
    refused(INPUT, *again[:-1], DEEPSEEK, "--overwrite", says=("8 counts, the checkpoint 16 experts",))
    refused(INPUT, "profile", "import", tmp_path / "nothing", *again[3:], "--overwrite", says=("cannot be read",))
    counts.write_bytes(b"\xff\xfe\xff")
    refused(INPUT, *again, "--overwrite", says=("is no text",))


@both
def test_every_choice_says_how_sure_it_is(name: str, out: Path, profiles: dict[str, Path]) -> None:
    """512 tokens of few documents: too little, and said in one line."""
    prune = ("prune", name, out, "--profile", profiles[name], "--keep", "6", "--dry-run")
    report = succeeded(*prune, "--json").json
    found = report["stability"]
    assert set(found) == {"changed", "worst", "worst_layer", "tokens", "settled"}
    assert not found["settled"] and 0 < found["changed"] <= found["worst"] <= 1
    assert str(found["worst_layer"]) in report["kept"]
    (short,) = (warning for warning in report["warnings"] if "too short" in warning)
    assert "\n" not in short
    for layer, experts in report["low_support"].items():
        assert set(experts) <= set(report["dropped"][layer])
    shown = succeeded(*prune)
    assert f"note: {short}\n" in shown.err and "stability: half of the documents would change" in shown.out
    seeded = succeeded(*prune, "--criterion", "random", "--json").json
    assert "stability" not in seeded


def test_below_lists_candidates(out: Path, profiles: dict[str, Path]) -> None:
    prune = ("prune", DEEPSEEK, out, "--profile", profiles[DEEPSEEK], "--below")
    report = succeeded(*prune, "0.3", "--dry-run", "--json").json
    found, share = report["candidates"], load_profile(profiles[DEEPSEEK]).statistics.utilization() * 4
    assert found["count"] == (share < 0.3).sum(axis=1).min() > 0
    assert {layer: len(experts) for layer, experts in found["layers"].items()} == {
        layer: int((share[row] < 0.3).sum()) for row, layer in enumerate(found["layers"])
    }
    assert report["criterion"] == "frequency" and report["below"] == 0.3
    assert report["experts_after"] == max(16 - found["count"], 4)
    shown = succeeded(*prune, "0.3", "--dry-run").out
    for heading in ("under 0.3 of the tokens", "share", "95 % interval", "reap", "rank correlation", "same drops"):
        assert heading in shown
    assert not out.exists()
    written = succeeded(*prune, "0.3", "--criterion", "reap", "--json").json
    assert written["criterion"] == "reap"
    assert succeeded("inspect", out, "--json").json["experts"] == report["experts_after"]
    assert json.loads((out / "moesurgeon.json").read_text())["history"][0]["operations"][0]["below"] == 0.3


def test_below_with_nothing_below(out: Path, profiles: dict[str, Path]) -> None:
    prune = ("prune", MIXTRAL, out, "--profile", profiles[MIXTRAL], "--below", "0.0001")
    report = succeeded(*prune, "--dry-run", "--json").json
    assert report["candidates"]["count"] == 0 and report["experts_after"] == 8
    refused(USAGE, *prune, says=("nothing to prune", "raise --below", "--dry-run"))
    refused(USAGE, *prune[:-1], "5", says=("--below 5", "share of the tokens"))
    refused(USAGE, *prune, "--keep", "6", says=("one of them",))
    refused(USAGE, "prune", MIXTRAL, out, "--below", "0.1", "--keep-experts", "x.json", says=("leave out", "--below"))
    assert not out.exists()


def test_a_folder_of_that_name_is_a_checkpoint_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        INPUT,
        "profile",
        "./show",
        "-o",
        tmp_path / "out",
        says=("show does not exist; give the folder of a checkpoint",),
    )
    refused(INPUT, "profile", "show", "nowhere", says=("nowhere is no profile",))
    refused(USAGE, "profile", "show")
