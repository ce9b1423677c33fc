"""Text that heals and text that judges: in splits of one trace, or in files of their own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import InputError
from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.recipe_file import read_recipe
from moesurgeon.pipeline.text_roles import RoleText
from tests.cli.invoke import refused, succeeded

MIXTRAL = "builtin:tiny-mixtral"
FEW = ("--heal-method", "none", "--heal-tokens", "2000", "--heal-heldout", "1000")


def _rows(path: Path, numbers: Iterable[int]) -> Path:
    def text(number: int) -> str:
        rng = random.Random(number)
        return f"document {number}: " + " ".join(f"{rng.randrange(1000)}" for _ in range(40))

    path.write_text("".join(json.dumps({"text": text(number)}) + "\n" for number in numbers))
    return path


@pytest.fixture
def keep(tmp_path: Path) -> Path:
    path = tmp_path / "keep.json"
    path.write_text(json.dumps({str(layer): [0, 1, 2, 3, 4, 7] for layer in range(4)}))
    return path


@pytest.fixture
def heal(tmp_path: Path) -> Path:
    return _rows(tmp_path / "heal.jsonl", range(30))


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    return _rows(tmp_path / "judge.jsonl", range(30, 42))


def test_given_files_are_read_whole(keep: Path, heal: Path, judge: Path, out: Path) -> None:
    report = succeeded(
        "prune", MIXTRAL, out, "--keep-experts", keep, "--heal", f"code={heal}", "--validation", judge, *FEW,
        "--heal-tokens", "100000", "--heal-heldout", "100000", "--json",
    ).json  # fmt: skip
    text = report["healed"]["text"]
    assert text["calibration"]["code"]["documents"] == 30 and text["calibration"]["code"]["split"] == "all"
    assert text["validation"]["judge"]["documents"] == 12 and text["validation"]["judge"]["split"] == "all"
    assert text["calibration"]["code"]["files"] == {"read": 1, "of": 1, "names": ["heal.jsonl"]}
    assert report["healed"]["gap"]["documents"] == 12


def test_one_document_heals_where_others_judge(keep: Path, judge: Path, tmp_path: Path, out: Path) -> None:
    one = _rows(tmp_path / "one.jsonl", range(1))
    line = refused(3, "prune", MIXTRAL, out, "--keep-experts", keep, "--heal", one, *FEW, says=("one document",))
    assert "--validation" in line
    succeeded("prune", MIXTRAL, out, "--keep-experts", keep, "--heal", one, "--validation", judge, *FEW)


@pytest.mark.parametrize("command", ["prune", "retop", "recover", "layers"])
def test_what_heals_cannot_judge(command: str, keep: Path, heal: Path, tmp_path: Path, out: Path) -> None:
    judge = _rows(tmp_path / "judge.jsonl", [0, 1, *range(30, 42)])
    given: dict[str, tuple[str | Path, ...]] = {
        "prune": ("prune", MIXTRAL, out, "--keep-experts", keep, "--heal", heal, *FEW),
        "retop": ("retop", MIXTRAL, out, "--top-k", "1", "--calibrate", heal, *FEW),
        "recover": ("recover", tmp_path / "top1", out, "--teacher", MIXTRAL, "-t", heal, "--steps", "1"),
        "layers": (
            "recover", tmp_path / "top1", out, "--teacher", MIXTRAL, "-t", heal, "--steps", "0", "--heal-method",
            "scale",
        ),
    }  # fmt: skip
    if command in ("recover", "layers"):
        succeeded("retop", MIXTRAL, tmp_path / "top1", "--top-k", "1")
    says = ("2 of the ", " validation documents of judge are in the calibration text of heal", "judge.jsonl, line 1")
    refused(3, *given[command], "--validation", judge, says=says)
    refused(3, *given[command], "--validation", judge, "--dry-run", says=says)
    assert not out.exists()


def test_builtin_text_judges_and_heals_in_its_own_splits(keep: Path, heal: Path, out: Path) -> None:
    given = ("--heal", heal, "--heal", "builtin:json", "--validation", "builtin:json", "--validation", "builtin:logs")
    report = succeeded("prune", MIXTRAL, out, "--keep-experts", keep, *given, *FEW, "--dry-run", "--json").json
    text = report["healed"]["text"]
    assert {domain: each["split"] for domain, each in text["calibration"].items()} == {
        "heal": "all", "json": "calibration",
    }  # fmt: skip
    assert {domain: each["split"] for domain, each in text["validation"].items()} == {
        "json": "validation", "logs": "validation",
    }  # fmt: skip


def test_how_much_heals_and_judges_is_said(keep: Path, heal: Path, out: Path) -> None:
    given = ("prune", MIXTRAL, out, "--keep-experts", keep, "--heal", heal, *FEW)
    planned = succeeded(*given, "--dry-run")
    assert "calibration text: heal" in planned.out and "validation text: heal 5 documents, " in planned.out
    done = succeeded(*given)
    assert "calibration text: heal" in done.err and "validation text: heal 5 documents, " in done.err


def test_a_gate_of_a_cut_names_the_domains_that_judge(keep: Path, heal: Path, judge: Path, out: Path) -> None:
    given = ("prune", MIXTRAL, out, "--keep-experts", keep, "--heal", heal, "--validation", judge, *FEW)
    refused(2, *given, "--gate", "domains.heal.loss < 9", says=("domains has judge",))
    succeeded(*given, "--gate", "domains.judge.perplexity_ratio < 99")


def test_too_little_validation_text_is_said(keep: Path, heal: Path, tmp_path: Path, out: Path) -> None:
    one = _rows(tmp_path / "one.jsonl", range(50, 51))
    given = ("prune", MIXTRAL, out, "--keep-experts", keep, "--heal", heal, "--validation", one, *FEW)
    done = succeeded(*given)
    assert "one document judges, which gives no interval: give more validation documents" in done.err
    assert "one document judges" in done.out


def test_recovery_judges_on_given_files(heal: Path, judge: Path, tmp_path: Path, out: Path) -> None:
    succeeded("retop", MIXTRAL, tmp_path / "top1", "--top-k", "1")
    report = succeeded(
        "recover", tmp_path / "top1", out, "--teacher", MIXTRAL, "-t", heal, "--validation", f"other={judge}",
        "--steps", "1", "--tokens-per-step", "64", "--length", "32", "--dry-run", "--json",
    ).json  # fmt: skip
    assert report["text"]["validation"]["other"]["documents"] == 12
    assert report["splits"] == {"heal": "all"}


def _recipe(folder: Path, text: str) -> Any:
    path = folder / "r.yaml"
    path.write_text(f"checkpoint: {MIXTRAL}\ntext: {text}\nsteps:\n  - retop: {{heal: {{method: none}}}}\n")
    return read_recipe(path)


def test_a_recipe_names_text_by_what_it_is_for(tmp_path: Path) -> None:
    text = _recipe(
        tmp_path,
        "{calibration: [builtin:json, builtin:logs], validation: [builtin:python], report: [builtin:prose], length: 64,"
        " budgets: {json: 5k}}",
    ).text
    assert text.calibrating == Text(traces=("builtin:json", "builtin:logs"), length=64, budgets={"json": "5k"})
    assert text.profiled(999) == Text(
        traces=("builtin:json", "builtin:logs"), length=64, budgets={"json": "5k"}, max_tokens=999
    )
    assert text.reported(999) == Text(traces=("builtin:prose",), length=64, max_tokens=999)
    old = _recipe(tmp_path, "{traces: [builtin:json]}").text
    assert old == RoleText(traces=("builtin:json",))
    assert old.profiled(9) == Text(traces=("builtin:json",), split="calibration", max_tokens=9)
    assert old.reported(9) == Text(traces=("builtin:json",), split="report", max_tokens=9)
    apart = _recipe(tmp_path, "{calibration: [builtin:json], report: [builtin:logs]}").text
    assert apart.profiled(9).split == "calibration" and apart.reported(9).traces == ("builtin:logs",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{traces: [builtin:json], calibration: [builtin:logs]}", "two words for one thing"),
        ("{calibration: [builtin:json], validation: [builtin:logs]}", "validation is given without report.*name files"),
        ("{calibration: []}", "calibration names no traces"),
        ("{validation: [], report: [builtin:json]}", "validation names no traces"),
    ],
)
def test_text_that_contradicts_itself_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        _recipe(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_run_heals_judges_and_reports_on_files_of_their_own(heal: Path, judge: Path, tmp_path: Path) -> None:
    report = _rows(tmp_path / "report.jsonl", range(60, 70))
    path = tmp_path / "r.yaml"
    path.write_text(
        f"checkpoint: {MIXTRAL}\n"
        f"text: {{calibration: [{heal}], validation: ['v={judge}'], report: ['r={report}'], length: 64}}\n"
        "report_tokens: 512\nsteps:\n"
        "  - retop: {heal: {method: none, max_tokens: 512, heldout_tokens: 512}}\n"
    )
    succeeded("run", path, "-o", tmp_path / "run")
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert all(set(stage["domains"]) == {"r"} for stage in figures["stages"])
