"""``harness``: tasks from local files, offline, and what cannot be run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.invoke import finished, refused, succeeded
from tests.conftest import BUILTIN

needs_extra = pytest.mark.usefixtures("_extra")
MIXTRAL = BUILTIN[0]

CHOICE = """\
task: local_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORDS = """\
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
TEXTS = """\
task: local_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def _extra() -> None:
    pytest.importorskip("lm_eval", reason="needs the extra harness: pip install 'moesurgeon[harness]'")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three tasks on the same eight examples."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "sums.jsonl"
    rows = [
        {"question": f"{n} + {n} =", "choices": [f" {2 * n}", f" {2 * n + 1}", " many words"], "answer": 0}
        for n in range(3, 11)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("sums", CHOICE), ("words", WORDS), ("texts", TEXTS)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@needs_extra
def test_tasks_of_a_folder(tasks: Path) -> None:
    names = ("--task", "local_sums", "--task", "local_words", "--task", str(tasks / "texts.yaml"))
    report = succeeded("harness", MIXTRAL, *names, "--tasks-folder", tasks, "--json").json
    assert list(report["tasks"]) == ["local_sums", "local_words", "local_texts"]
    assert report["samples"] == {"local_sums": 8, "local_words": 8, "local_texts": 8}
    assert report["resident"] is True and report["limit"] is None
    sums = report["tasks"]["local_sums"]
    assert 0 <= sums["acc,none"] <= 1 and sums["acc_stderr,none"] >= 0 and 0 <= sums["acc_norm,none"] <= 1
    assert report["tasks"]["local_words"]["word_perplexity,none"] > 1
    assert report["tasks"]["local_words"]["word_perplexity_stderr,none"] is None
    assert 0 <= report["tasks"]["local_texts"]["exact_match,none"] <= 1
    few = ("harness", MIXTRAL, *names[:4], "--tasks-folder", tasks, "--limit", "3")
    assert succeeded(*few, "--json").json["samples"] == {"local_sums": 3, "local_words": 3}
    shown = succeeded(*few)
    assert shown.err == ""
    for part in ("task", "metric", "standard error", "examples", "local_sums", "acc_norm", "bits_per_byte", "lm-eval"):
        assert part in shown.out


@needs_extra
def test_as_a_process(tasks: Path) -> None:
    outcome = finished("harness", MIXTRAL, "--task", tasks / "sums.yaml", "--limit", "2", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.json["samples"] == {"local_sums": 2}


@needs_extra
def test_tasks_that_cannot_be_run(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager  # without lm-eval's own thousands of files
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: real(None, include_path, False))
    command = ("harness", MIXTRAL, "--task")
    refused(2, *command, tasks / "nowhere.yaml", says=("no such file", "give a task's name"))
    refused(2, *command, "no_such_task", says=("has no such task", "--tasks-folder"))
    refused(2, *command, "local_sums", "--tasks-folder", tmp_path / "nowhere", says=("is no folder",))
    refused(3, "harness", tmp_path, "--task", tasks / "sums.yaml", says=("config.json",))
    first, *others = (tasks / "sums.jsonl").read_text().splitlines()
    holes = [json.dumps({**json.loads(line), "choices": None}) for line in others]
    (tasks / "holes.jsonl").write_text("\n".join([first, *holes]))
    bad = tasks / "bad.yaml"
    for text, says in (
        ("task: [", "cannot be loaded"),
        (CHOICE.format(data=tasks / "nowhere.jsonl"), "cannot be loaded"),
        (CHOICE.format(data=tasks / "sums.jsonl").replace("{{answer}}", "{{nothing}}"), "'nothing' is undefined"),
        (CHOICE.format(data=tasks / "holes.jsonl"), "a task failed"),
        (TEXTS.format(data=tasks / "sums.jsonl").replace("metric: exact_match", "metric: guess"), ""),
    ):
        bad.write_text(text)
        refused(3, *command, bad, says=(says, "correct its YAML"))
    bad.write_text(
        TEXTS.format(data=tasks / "sums.jsonl").replace("max_gen_toks: 8", "max_gen_toks: 8, do_sample: true")
    )
    refused(2, *command, bad, says=("only greedy ones are made",))


@needs_extra
def test_texts_need_the_checkpoint_in_memory(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesurgeon.engine import budget

    monkeypatch.setattr(budget, "taken_bytes", lambda *_given: 0)
    limit = ("--max-memory", "10MB")
    report = succeeded("harness", MIXTRAL, "--task", tasks / "sums.yaml", "--json", *limit).json
    assert report["resident"] is False
    says = ("a task that generates text needs the checkpoint in memory", "give at least")
    refused(2, "harness", MIXTRAL, "--task", tasks / "texts.yaml", *limit, says=says)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(each for each in sys.modules if each.partition(".")[0] == "lm_eval"), "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    says = ("the lm-evaluation-harness is not installed", "pip install 'moesurgeon[harness]'")
    refused(2, "harness", MIXTRAL, "--task", "arc_easy", says=says)
