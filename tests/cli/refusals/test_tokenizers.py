"""Another checkpoint with another tokenizer: refused by everything that runs both on one text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moesurgeon.pipeline.subject import open_subject
from tests.cli.conftest import TEXT
from tests.cli.invoke import moesurgeon, refused, succeeded

MIXTRAL = "builtin:tiny-mixtral"
SAYS = ("different tokenizers", "entries of the vocabulary differ", "copy the tokenizer files")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The builtin checkpoint, its tokens renumbered."""
    copy = tmp_path / "other"
    shutil.copytree(open_subject(MIXTRAL).root, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    late = [token for token, number in vocabulary.items() if number > 300]
    vocabulary.update(zip(late, [vocabulary[token] for token in reversed(late)], strict=True))
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


def test_evaluate(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.evaluate.measure", pytest.fail)
    refused(3, "evaluate", other, "--against", MIXTRAL, *TEXT, says=SAYS)
    refused(3, "evaluate", MIXTRAL, "--against", other, *TEXT, says=SAYS)


def test_healing_and_recovery(other: Path, out: Path, top1: dict[str, Path], tmp_path: Path) -> None:
    heal = ("--heal", "builtin:json", "--heal-tokens", "512", "--heal-heldout", "256", "--heal-teacher", other)
    refused(3, "prune", MIXTRAL, out, "--stages", "7", *heal, says=SAYS)
    refused(3, "retop", MIXTRAL, out, "--calibrate", "builtin:json", "--heal-teacher", other, says=SAYS)
    recover = ("recover", top1[MIXTRAL], out, "--teacher", other, *TEXT)
    refused(3, *recover, says=SAYS)
    refused(3, *recover, "--dry-run", says=SAYS)
    layers = ("recover", top1[MIXTRAL], out, "--teacher", other, "-t", "builtin:json", "--heal-method", "ridge")
    refused(3, *layers, "--steps", "0", "--dry-run", says=SAYS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"checkpoint: {MIXTRAL}\ntext: {{traces: ['builtin:json']}}\n"
        f"steps: [{{retop: {{heal: {{teacher: {other}}}}}}}]\n"
    )
    refused(3, "run", recipe, "-o", tmp_path / "run", says=SAYS)
    assert not out.exists() and not (tmp_path / "run").exists()


def test_a_checkpoint_without_a_tokenizer_takes_that_of_the_other(other: Path) -> None:
    (other / "tokenizer.json").unlink()
    outcome = moesurgeon("evaluate", MIXTRAL, "--against", other, *TEXT)
    assert outcome.code == 0
    assert outcome.err.strip() == (f"note: {other} has no tokenizer; its text is made with the tokenizer of {MIXTRAL}")
    refused(3, "evaluate", other, "--against", MIXTRAL, *TEXT, says=("no tokenizer", "copy tokenizer.json"))


def test_a_tokenizer_that_is_written_otherwise_is_the_same(other: Path) -> None:
    tokenizer = json.loads((open_subject(MIXTRAL).root / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=4))
    report = succeeded("evaluate", other, "--against", MIXTRAL, *TEXT, "--json").json
    assert report["against"]["perplexity_ratio"] == 1.0
