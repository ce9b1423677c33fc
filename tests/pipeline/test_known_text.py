"""A checkpoint knows which documents healed it, over its whole history: they are no proof of its quality."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.evaluate import EvaluateSpec, evaluate
from moesurgeon.pipeline.known_text import counted, known_text
from moesurgeon.pipeline.options import HealSpec, Running, Text, Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recover import RecoverSpec, recover
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.traces.builtin import BUILTIN_TRACES
from moesurgeon.traces.document_hashes import hashes_of
from moesurgeon.traces.documents import Document
from moesurgeon.traces.texts import key_of
from tests.cli.invoke import moesurgeon, refused

MIXTRAL = "builtin:tiny-mixtral"
RUNNING = Running(device="cpu", dtype="float32")
KEPT = {layer: [0, 1, 2, 3, 4, 5] for layer in range(4)}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Text of one's own, of a kind that the checkpoint knows."""
    folder = tmp_path_factory.mktemp("traces")
    texts = [document.text[:250] for document in itertools.islice(BUILTIN_TRACES["json"]("train"), 200)]
    path = folder / "heal.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"heal": path}


@pytest.fixture(scope="module")
def healed(traces: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was cut and healed on two thousand tokens of one trace."""
    folder = tmp_path_factory.mktemp("healed")
    report = healed_to(folder / "out", traces["heal"])
    assert report["healed"]["kept"]
    return folder / "out"


def healed_to(out: Path, path: Path) -> dict[str, Any]:
    kept = out.with_suffix(".json")
    kept.write_text(json.dumps(KEPT))
    heal = HealSpec(traces=(f"code={path}",), method="ridge", max_tokens=2000, heldout_tokens=800, length=128)
    return prune(MIXTRAL, PruneSpec(keep_experts=kept, heal=heal), Writing(output=out), running=RUNNING)


def calibrated(folder: Path, path: Path, target: Path) -> int:
    """Write to ``target`` the documents of ``path`` that healed the checkpoint; return how many."""
    known = known_text(open_subject(str(folder))).calibrated
    lines = path.read_text().splitlines(keepends=True)
    texts = [json.loads(line)["text"] for line in lines]
    found = [
        line
        for line, text in zip(lines, texts, strict=True)
        if not known.isdisjoint(hashes_of(Document(key_of(text), text)))
    ]
    target.write_text("".join(found))
    return len(found)


def operation(folder: Path, name: str) -> dict[str, Any]:
    history = json.loads((folder / "moesurgeon.json").read_text())["history"]
    return next(each for step in history for each in step["operations"] if each["operation"] == name)


def measured(folder: Path, path: Path, *, max_tokens: int = 1500, **spec: Any) -> dict[str, Any]:
    text = Text(traces=(f"code={path}",), max_tokens=max_tokens, length=128)
    return evaluate(str(folder), None, text, RUNNING, spec=EvaluateSpec(**spec))


def test_what_healed_is_in_the_record_and_nowhere_long(healed: Path, traces: dict[str, Path], tmp_path: Path) -> None:
    known = known_text(open_subject(str(healed)))
    assert len(known.calibrated) > 10 and known.judged and known.calibrated.isdisjoint(known.judged)
    documents = operation(healed, "heal")["documents"]
    assert {role: len(text) // 8 for role, text in documents.items()} == {
        "calibration": len(known.calibrated),
        "validation": len(known.judged),
    }
    assert documents["calibration"] not in (healed / "README.md").read_text()
    checked = verify(str(healed), source=MIXTRAL)
    assert checked["history"][0][1]["documents"]["calibration"] == len(known.calibrated)
    assert counted(3) == 3 and counted({"documents": {"calibration": 5}}) == {"documents": {"calibration": 5}}
    healed_to(tmp_path / "again", traces["heal"])
    for name in ("moesurgeon.json", "README.md", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (healed / name).read_bytes()


def test_evaluate_leaves_them_out_and_reads_others(healed: Path, traces: dict[str, Path]) -> None:
    known = known_text(open_subject(str(healed)))
    report = measured(healed, traces["heal"])
    assert report["healed_text"]["left_out"]["documents"] > 0 and report["healed_text"]["included"]["documents"] == 0
    assert abs(report["tokens"] + report["documents"] * 2 - 1500) < 200  # as many as asked for: others in their place
    everything = measured(healed, traces["heal"], max_tokens=1_000_000)
    assert everything["healed_text"]["left_out"]["documents"] == len(known.calibrated)
    assert everything["healed_text"]["judged"]["documents"] == len(known.judged)
    included = measured(healed, traces["heal"], max_tokens=1_000_000, include_healed=True)
    assert included["healed_text"]["left_out"] == {"documents": 0, "tokens": 0}
    assert included["healed_text"]["included"]["documents"] == len(known.calibrated)
    assert included["documents"] == everything["documents"] + len(known.calibrated)
    untouched = evaluate(MIXTRAL, None, Text(traces=(f"code={traces['heal']}",), max_tokens=1500, length=128), RUNNING)
    assert untouched["healed_text"]["left_out"]["documents"] == 0


def test_builtin_splits_share_no_document(healed: Path) -> None:
    text = Text(traces=("builtin:json",), max_tokens=400, length=64)
    assert evaluate(str(healed), MIXTRAL, text, RUNNING)["healed_text"]["left_out"]["documents"] == 0


def test_it_is_said_plainly(healed: Path, traces: dict[str, Path], tmp_path: Path) -> None:
    command: tuple[str | Path, ...] = ("-t", f"code={traces['heal']}", "--length", "128", "--max-tokens", "1500")
    for sides in ((healed,), (healed, "--against", MIXTRAL), (MIXTRAL, "--against", healed)):
        outcome = moesurgeon("evaluate", *sides, *command)
        assert outcome.code == 0
        assert f"of code healed {healed}: they are left out, others are read as far as there are any" in outcome.err
    outcome = moesurgeon("evaluate", healed, *command, "--include-healed")
    assert outcome.code == 0 and f"healed {healed}: the figures are not held out" in outcome.err
    only = tmp_path / "seen.jsonl"
    seen = calibrated(healed, traces["heal"], only)
    says = (f"all {seen} documents healed {healed}", "none is left to measure on", "--include-healed")
    refused(3, "evaluate", healed, "-t", only, "--length", "128", says=says)
    assert moesurgeon("evaluate", healed, "-t", only, "--length", "128", "--include-healed").code == 0


def test_text_that_calibrated_cannot_judge_the_next_step(healed: Path, traces: dict[str, Path], tmp_path: Path) -> None:
    """The same trace again has the same splits; a file of what healed has others."""
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({layer: [0, 1, 2, 3, 4] for layer in range(4)}))
    heal = HealSpec(traces=(f"code={traces['heal']}",), method="ridge", max_tokens=600, heldout_tokens=400, length=128)
    prune(str(healed), PruneSpec(keep_experts=kept, heal=heal), Writing(output=tmp_path / "again"), running=RUNNING)
    before, after = (known_text(open_subject(str(folder))) for folder in (healed, tmp_path / "again"))
    assert before.calibrated <= after.calibrated  # the whole history
    part = tmp_path / "part.jsonl"
    calibrated(healed, traces["heal"], part)
    for arguments in (
        ("prune", healed, tmp_path / "out", "--keep-experts", kept, "--heal", f"code={part}", "--heal-method", "ridge",
         "--heal-tokens", "600", "--heal-heldout", "400"),
        ("prune", healed, tmp_path / "out", "--keep", "5", "--gate", "loss < 99", "--heal", f"code={part}",
         "--heal-method", "none"),
        ("recover", healed, tmp_path / "out", "--teacher", MIXTRAL, "-t", f"code={part}", "--length", "128",
         "--steps", "1", "--heldout-tokens", "400"),
    ):  # fmt: skip
        says = ("of the validation text calibrated", "in an earlier step, and cannot judge it", "give other text")
        refused(3, *arguments, says=says)
        assert not (tmp_path / "out").exists()


def test_recovery_records_what_it_was_trained_on(traces: dict[str, Path], healed: Path, tmp_path: Path) -> None:
    schedule = Schedule(steps=4, tokens_per_step=512, judge_every=2, learning_rate=2e-3, rank=4)
    spec = RecoverSpec(teacher=MIXTRAL, schedule=schedule, adapt=("experts",), heldout_tokens=600)
    text = Text(traces=(f"code={traces['heal']}",), max_tokens=4000, length=128)
    report = recover(str(healed), spec, text, RUNNING, Writing(output=tmp_path / "out"))
    assert report["loss_after"] < report["loss_before"]
    documents = operation(tmp_path / "out", "recover")["documents"]
    known = known_text(open_subject(str(tmp_path / "out")))
    assert documents["calibration"] and documents["validation"]
    assert known_text(open_subject(str(healed))).calibrated <= known.calibrated


def _edited(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    import shutil

    shutil.copytree(source, target)
    record = json.loads((target / "moesurgeon.json").read_text())
    change(record["history"][0]["operations"][1])
    (target / "moesurgeon.json").write_text(json.dumps(record))
    return target


def test_a_record_of_an_earlier_version_knows_the_whole_text(
    healed: Path, traces: dict[str, Path], tmp_path: Path
) -> None:
    earlier = _edited(healed, tmp_path / "earlier", lambda operation: operation.pop("documents"))
    assert known_text(open_subject(str(earlier))).calibrated == frozenset()
    same = Text(traces=(f"code={traces['heal']}",), max_tokens=2000, length=128, split="train")
    report = evaluate(str(earlier), None, same, RUNNING)
    assert report["healed_text"]["unnamed"] == ["code"]
    command = ("evaluate", earlier, "-t", f"code={traces['heal']}", "--length", "128")
    outcome = moesurgeon(*command, "--max-tokens", "2000", "--split", "train")
    assert "the text of code is what healed" in outcome.err and outcome.code == 0
    assert moesurgeon(*command, "--max-tokens", "900").err == ""


@pytest.mark.parametrize("damage", [5, "short", {"calibration": "ABC"}, {"calibration": ["a"]}, {"validation": 3}])
def test_a_damaged_record_is_refused(damage: Any, healed: Path, tmp_path: Path) -> None:
    damaged = _edited(healed, tmp_path / "damaged", lambda operation: operation.update(documents=damage))
    with pytest.raises(CheckpointError, match="holds a list of documents that is none") as raised:
        known_text(open_subject(str(damaged)))
    assert "\n" not in str(raised.value)
    verify(str(damaged))


def test_a_run_measures_all_stages_on_one_text(traces: dict[str, Path], tmp_path: Path) -> None:
    """Where what is reported on is what heals, it is left out of the original's text too."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"checkpoint: {MIXTRAL}\n"
        f"text: {{calibration: ['code={traces['heal']}'], report: ['code={traces['heal']}'], length: 128}}\n"
        "report_tokens: 1500\nsteps:\n  - retop: {heal: {method: ridge, max_tokens: 1000, heldout_tokens: 400}}\n"
    )
    outcome = moesurgeon("run", recipe, "-o", tmp_path / "run")
    assert outcome.code == 0
    notes = [line for line in outcome.err.splitlines() if "heal in a step of the recipe: they are left out" in line]
    assert len(notes) == 2 and notes[0] == notes[1]


def test_a_stage_that_was_judged_and_not_healed_says_by_what(traces: dict[str, Path], tmp_path: Path) -> None:
    heal = HealSpec(traces=(f"code={traces['heal']}",), method="none", max_tokens=600, heldout_tokens=400, length=128)
    spec = PruneSpec(stages=(7,), gates=("loss < 99",), heal=heal)
    report = prune(MIXTRAL, spec, Writing(output=tmp_path / "out"), running=RUNNING)
    assert report["stages"][0]["accepted"]
    unused = operation(tmp_path / "out", "prune")["unused_documents"]
    assert unused["calibration"] == "" and len(unused["validation"]) > 0
    known = known_text(open_subject(str(tmp_path / "out")))
    assert known.judged and not known.calibrated and not known.tried
    assert "unused_documents" not in (tmp_path / "out" / "README.md").read_text()
