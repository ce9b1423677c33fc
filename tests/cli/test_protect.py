"""``prune --protect`` and ``--explain``: what is reported, shown and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.invoke import refused, succeeded
from tests.conftest import BUILTIN

MIXTRAL, DEEPSEEK = BUILTIN
USAGE, INPUT = 2, 3


@pytest.mark.parametrize("name", BUILTIN)
def test_what_protection_changed(name: str, out: Path, profiles: dict[str, Path]) -> None:
    prune = ("prune", name, out, "--profile", profiles[name], "--ratio", "0.25", "--criterion", "random")
    free = succeeded(*prune, "--dry-run", "--json").json
    assert "protection" not in free
    protect = ("--protect", "js", "--protect", "first-choice=0.2", "--protect", "low-support")
    report = succeeded(*prune, *protect, "--json").json
    found = report["protection"]
    default = 2 / report["experts_before"]
    assert found["names"] == {"js": default, "first-choice": 0.2, "low-support": None}
    for layer, kept in report["kept"].items():
        said = found["layers"][layer]
        assert said["kept_instead"] == sorted(set(kept) - set(free["kept"][layer]))
        assert said["dropped_instead"] == sorted(set(free["kept"][layer]) - set(kept))
        assert len(said["kept_instead"]) == len(said["dropped_instead"])
        protected = {claim["expert"] for claim in said["protected"]}
        assert set(said["went"]) == protected - set(kept)
    assert any(said["kept_instead"] for said in found["layers"].values())
    operation = json.loads((out / "moesurgeon.json").read_text())["history"][0]["operations"][0]
    assert operation["protect"] == found["names"]
    shown = succeeded(*prune, *protect, "--dry-run", "--overwrite")
    assert "protected for js (a share of " in shown.out and "first-choice (a share of 0.2), low-support: " in shown.out
    assert " for it, " in shown.out
    went = sum(len(said["went"]) for said in found["layers"].values())
    assert (f"note: {went} protected experts go all the same" in shown.err) == (went > 0)


@pytest.mark.parametrize(
    ("code", "protect", "says"),
    [
        (USAGE, "prose", ("no domain 'prose'", "arithmetic, js", "low-support")),
        (USAGE, "js=2", ("'2' is no share",)),
        (INPUT, "long-context", ("no text beyond position", "--length")),
    ],
)
def test_what_cannot_be_protected(
    code: int, protect: str, says: tuple[str, ...], out: Path, profiles: dict[str, Path]
) -> None:
    prune = ("prune", MIXTRAL, out, "--profile", profiles[MIXTRAL], "--keep", "6")
    refused(code, *prune, "--protect", protect, says=says)
    assert not out.exists()


def test_a_choice_that_was_made_needs_neither(out: Path) -> None:
    prune = ("prune", MIXTRAL, out, "--keep-experts", "x.json")
    refused(USAGE, *prune, "--protect", "js", says=("--protect goes by a profile", "leave --protect out"))
    refused(USAGE, *prune, "--explain", says=("--explain", "add --profile"))


def test_a_server_s_counts(out: Path, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({str(layer): [5000, 10, 900, 900, 900, 900, 900, 900] for layer in range(4)}))
    succeeded("profile", "import", counts, "--checkpoint", MIXTRAL, "-o", tmp_path / "served", "--json")
    prune = ("prune", MIXTRAL, out, "--profile", tmp_path / "served", "--keep", "6", "--criterion", "random")
    report = succeeded(*prune, "--protect", "served", "--protect", "low-support", "--dry-run", "--json").json
    for layer, kept in report["kept"].items():
        assert {0, 1} <= set(kept)
        by = {claim["expert"]: claim["by"] for claim in report["protection"]["layers"][layer]["protected"]}
        assert by == {0: ["served"], 1: ["low-support"]}
    refused(INPUT, *prune, "--protect", "first-choice", says=("token counts only", "served", "moesurgeon profile"))
    for layer, dropped in report["dropped"].items():
        assert [entry["interval"][1] for entry in report["explained"][layer]] == [None] * len(dropped)


@pytest.mark.parametrize("name", BUILTIN)
def test_every_expert_that_goes_is_explained(name: str, out: Path, profiles: dict[str, Path]) -> None:
    prune = ("prune", name, out, "--profile", profiles[name], "--ratio", "0.25", "--dry-run")
    report = succeeded(*prune, "--json").json
    assert report["destinations"]["from"] is None and "--inner" in report["destinations"]["reason"]
    for layer, dropped in report["dropped"].items():
        entries = report["explained"][layer]
        assert [entry["rank"] for entry in entries] == list(range(1, len(dropped) + 1))
        assert sorted(entry["expert"] for entry in entries) == dropped
        for entry in entries:
            assert entry["goes_to"] is None and set(entry["utilization"]) == {"arithmetic", "js"}
            assert {place["expert"] for place in entry["beside"]} <= set(report["kept"][layer])
    assert "goes to" not in succeeded(*prune).out
    shown = succeeded(*prune, "--explain").out
    for heading in (
        "what goes",
        "95 % interval",
        "most in",
        "reap",
        "rank",
        "goes to",
        "beside",
        "profile with --inner",
    ):
        assert heading in shown
    assert "(hardly seen)" in shown


def test_with_inner_products_destinations_are_counted(out: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    text = ("-t", "builtin:json", "--max-tokens", "512", "--inner", "256")
    succeeded("profile", MIXTRAL, "-o", profile, *text, "--json")
    prune = ("prune", MIXTRAL, out, "--profile", profile, "--keep", "6", "--dry-run")
    report = succeeded(*prune, "--json").json
    assert report["destinations"] == {"from": "inner", "tokens": 256}
    for layer, entries in report["explained"].items():
        for entry in entries:
            if entry["goes_to"] is not None:
                assert {place["expert"] for place in entry["goes_to"]} <= set(report["kept"][layer])
                assert 0 < sum(place["share"] for place in entry["goes_to"]) <= 1 + 1e-9
            else:
                assert entry["tokens"] == 0
    assert any(entry["goes_to"] for entries in report["explained"].values() for entry in entries)
    assert "where tokens go is not known" not in succeeded(*prune, "--explain").out
