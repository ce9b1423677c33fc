"""Budgets, weights and samples from the command line and from a recipe, to the artefact and the record of a cut."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import UsageError
from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.recipe_file import read_recipe
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.text import cut_notes, read_text, trace_specs
from moesurgeon.profiling.artefact import load_profile
from moesurgeon.selection.choose import best
from moesurgeon.selection.criteria import scores_of
from tests.cli.invoke import refused, succeeded

TEXT = ("-t", "builtin:arithmetic", "-t", "js=builtin:json", "--max-tokens", "512", "--length", "64")


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weighted") / "profile"
    succeeded(
        "profile", "builtin:tiny-mixtral", "-o", path, *TEXT, "--budget", "js=2k", "--weight", "js=0", "--sample", "7",
        "--json",
    )  # fmt: skip
    return path


def test_the_artefact_says_what_was_read_and_what_it_counts(weighted: Path) -> None:
    origin = json.loads((weighted / "profile.json").read_text())["origin"]
    assert origin["weights"] == {"arithmetic": 1.0, "js": 0.0}
    assert (origin["sample"], origin["chat_template"]) == (7, None)
    profile = load_profile(weighted)
    assert dict(zip(profile.statistics.domains, profile.statistics.seen, strict=True)) == pytest.approx(
        {"arithmetic": 512, "js": 2000}, abs=8
    )


def test_a_cut_goes_by_the_weights_and_records_them(weighted: Path, out: Path) -> None:
    report = succeeded(
        "prune", "builtin:tiny-mixtral", out, "--profile", weighted, "--keep", "4", "--criterion", "frequency", "--json"
    ).json
    profile = load_profile(weighted)
    assert profile.statistics.by_domain("tokens")[1].any()  # the sums are without weights
    kept = best(scores_of(profile.weighted, "frequency"), profile.statistics.layers, 4)
    assert report["kept"] == {str(layer): list(experts) for layer, experts in kept.items()}
    assert kept != best(scores_of(profile.statistics, "frequency"), profile.statistics.layers, 4)
    (operation,) = json.loads((out / "moesurgeon.json").read_text())["history"][-1]["operations"]
    assert operation["domain_weights"] == {"arithmetic": 1.0, "js": 0.0}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--budget", "cod=5k"), "a budget is for 'cod', but the traces are arithmetic, js"),
        (("--budget", "js"), "NAME=VALUE"),
        (("--budget", "js=lots"), "is no budget"),
        (("--weight", "js=-2"), "is no weight"),
        (("--weight", "js=0", "--weight", "arithmetic=0"), "every --weight is 0"),
        (("--weight", "js=1", "--weight", "js=2"), "given twice"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(given: tuple[str, ...], says: str, out: Path) -> None:
    refused(2, "profile", "builtin:tiny-mixtral", "-o", out, *TEXT, *given, says=(says,))
    assert not out.exists()


def test_a_recipe_takes_the_same(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "checkpoint: builtin:tiny-mixtral\n"
        "text: {traces: [code=builtin:python, builtin:logs], budgets: {code: 200k, logs: 4096},"
        " weights: {code: 2, logs: 0.5}, sample: 3}\n"
        "steps: [{profile: }, {prune: {keep: 6}}]\n"
    )
    text = read_recipe(tmp_path / "r.yaml").text
    assert text.budgets == {"code": "200k", "logs": 4096}
    assert text.weights == {"code": 2, "logs": 0.5} and text.sample == 3
    assert [spec.domain for spec in trace_specs(text)] == ["code", "logs"]
    measured = text.even(max_tokens=1000, split="report")
    assert (measured.budgets, measured.weights, measured.sample, measured.max_tokens) == ({}, {}, 3, 1000)


@pytest.mark.parametrize("changes", [{"budgets": {"x": 8}}, {"weights": {"x": 1}}, {"sample": -1}, {"sample": 2**63}])
def test_a_recipe_is_refused_before_anything_is_read(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"is for 'x'|is no seed"):
        trace_specs(Text(traces=("builtin:logs",), **changes))


@pytest.mark.parametrize(("length", "says"), [(64, "% of the tokens .* --length 64.* its context is 512"), (512, None)])
def test_documents_far_longer_than_a_window_are_noted(tiny_mixtral: Subject, length: int, says: str | None) -> None:
    text = Text(traces=("builtin:python",), max_tokens=4000, length=length)
    corpus = read_text(tiny_mixtral, text, builtin_split="report")
    notes = cut_notes(tiny_mixtral, text, corpus)
    assert len(notes) == (says is not None)
    assert all(re.search(str(says), note) for note in notes)
    assert 0 <= corpus.cut <= 1


def test_a_chat_goes_through_the_checkpoints_own_template(tiny_mixtral: Subject, tmp_path: Path) -> None:
    shutil.copytree(tiny_mixtral.root, tmp_path / "source")
    template = "{% for m in messages %}<s>{{ m.role | upper }} {{ m.content }}{% endfor %}"
    (tmp_path / "source" / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": "user", "content": "what is four and four?" * 3}]} for _ in range(3)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Text(traces=(f"chat={tmp_path / 'chat.jsonl'}:messages",))
    subject = open_subject(str(tmp_path / "source"))
    corpus = read_text(subject, text, builtin_split="report")
    plain = read_text(tiny_mixtral, text, builtin_split="report")
    assert corpus.chat_template and plain.chat_template is None
    assert corpus.hashes != plain.hashes
    first, other = corpus.windows[0].tokens.tolist(), plain.windows[0].tokens.tolist()
    assert first != other and first.count(first[0]) == 1  # one <s>, which the template wrote


def _rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


TINY = ("--max-tokens", "256", "--length", "64")


def test_one_text_under_two_names_is_refused_before_any_work(tmp_path: Path, out: Path) -> None:
    path = _rows(tmp_path / "a.jsonl", [f"text {number} of some words and more" * 3 for number in range(9)])
    shutil.copy(path, tmp_path / "b.jsonl")
    both = ("-t", path, "-t", tmp_path / "b.jsonl")
    says = ("documents of b are in a as well", "twice")
    refused(3, "profile", "builtin:tiny-mixtral", "-o", out, *both, *TINY, says=says)
    refused(3, "evaluate", "builtin:tiny-mixtral", *both, *TINY, says=says)
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps({str(layer): list(range(6)) for layer in range(4)}))
    heal = ("--heal", path, "--heal", tmp_path / "b.jsonl", "--heal-method", "none")
    refused(3, "prune", "builtin:tiny-mixtral", out, "--keep-experts", keep, *heal, says=says)
    assert not out.exists()


@pytest.mark.parametrize("command", ["heal", "calibrate", "recover"])
def test_one_document_cannot_heal_and_judge(command: str, tmp_path: Path, out: Path) -> None:
    path = _rows(tmp_path / "one.jsonl", ["one text of some words and more " * 30] * 3)
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps({str(layer): list(range(6)) for layer in range(4)}))
    given: tuple[str | Path, ...] = {
        "heal": ("prune", "builtin:tiny-mixtral", out, "--keep-experts", keep, "--heal", path),
        "calibrate": ("retop", "builtin:tiny-mixtral", out, "--top-k", "1", "--calibrate", path),
        "recover": ("recover", "builtin:tiny-deepseek", out, "--teacher", "builtin:tiny-mixtral", "-t", path),
    }[command]  # fmt: skip
    if command == "recover":
        succeeded("retop", "builtin:tiny-mixtral", tmp_path / "top1", "--top-k", "1")
        given = ("recover", tmp_path / "top1", out, "--teacher", "builtin:tiny-mixtral", "-t", path)
    line = refused(3, *given, says=("one.jsonl has one document", "validation split"))
    assert "--split" not in line
    assert not out.exists()


def test_a_lone_text_file_is_said_to_be_divided(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"paragraph {number} " + "word " * 900 for number in range(8)))
    spec = ("evaluate", "builtin:tiny-mixtral", "-t", path, *TINY)
    assert "one text file" not in succeeded(*spec).err
    assert "book.txt is one text file, whose passages are dealt out" in succeeded(*spec, "--split", "report").err


def test_which_files_were_read_is_said(tmp_path: Path, out: Path) -> None:
    for kind in ("a", "b"):
        (tmp_path / "kinds" / kind).mkdir(parents=True)
        for number in range(30 if kind == "a" else 1):
            texts = [f"{kind} text {number} of some words and more " * 3 + str(row) for row in range(4)]
            _rows(tmp_path / "kinds" / kind / f"{number:02d}.jsonl", texts)
    given = ("profile", "builtin:tiny-mixtral", "-o", out, "-t", f"{tmp_path}/kinds/*")
    report = succeeded(*given, "--max-tokens", "100000", "--json").json
    assert report["files"]["b"] == {"read": 1, "of": 1, "names": ["00.jsonl"]}
    assert (report["files"]["a"]["read"], report["files"]["a"]["of"]) == (30, 30)
    assert report["files"]["a"]["names"] == [f"{number:02d}.jsonl" for number in range(20)]
    done = succeeded("evaluate", "builtin:tiny-mixtral", "-t", f"{tmp_path}/kinds/*", *TINY)
    assert re.search(r"a: \d+ of 30 files were read \(00.jsonl, ", done.err) and "b: " not in done.err
