"""Recipes that cannot be carried out, found before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.invoke import refused
from tests.cli.refusals.places import INPUT, MIXTRAL, USAGE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ("the recipe must be keys with values",)),
        ("just words", ("the recipe must be keys with values", "see")),
        ("a: [", ("not valid YAML", "correct it")),
        ("[" * 5000, ("not valid YAML", "correct it")),
        ("a: !!python/object/apply:os.system [ls]", ("not valid YAML", "correct it")),
        ("steps: [{retop: {}}]", ("checkpoint is missing", "add it")),
        ("checkpoint: builtin:tiny-mixtral", ("steps is missing", "add it")),
        ("checkpoint: 5\nsteps: [{retop: {}}]", ("line 1", "checkpoint must be text, not 5", "quotes")),
        ("checkpoint: c\nsteps: []", ("no steps", "list at least one")),
        ("checkpoint: c\nsteps: 5", ("steps",)),
        ("checkpoint: c\nsteps: [5]", ("steps.0 must be keys with values",)),
        ("checkpoint: c\nsteps: [{}]", ("steps.0", "exactly one key")),
        ("checkpoint: c\nsteps: [{retop: {}, recover: {}}]", ("steps.0", "exactly one key")),
        ("checkpoint: c\nsteps: [{frobnicate: {}}]", ("steps.0.frobnicate", "no such key")),
        ("checkpoint: c\nspeed: fast\nsteps: [{retop: {}}]", ("speed", "no such key")),
        ("checkpoint: c\nsteps: [{retop: {topk: 1}}]", ("line 2", "steps.0.retop.topk", "did you mean top_k?")),
        ("checkpoint: c\nsteps: [{retop: {}}]\nsteps: []", ("line 3, column 1", "steps comes twice", "line 2")),
        ("checkpoint: c\nsteps: [{retop: {top_k: true}}]", ("line 2", "top_k must be a whole number, not true")),
        ("checkpoint: c\nsteps: [{retop: {top_k: one}}]", ("steps.0.retop.top_k", "one")),
        ("checkpoint: c\nsteps: [{prune: {keep: 6}}]", ("prune needs a profile", "put a profile step before it")),
        ("checkpoint: c\nsteps: [{profile: {}}, {retop: {}}, {prune: {keep: 6}}]", ("prune needs a profile",)),
        ("checkpoint: c\nsteps: [{recover: {schedule: {steps: 0}}}]", ("recover.schedule.steps", "greater")),
        ("checkpoint: c\nsteps: [{recover: {schedule: {judge_every: 0}}}]", ("schedule.judge_every", "greater")),
        ("checkpoint: c\nsteps: [{recover: {schedule: {rank: 0}}}]", ("schedule.rank", "greater")),
        ("checkpoint: c\nsteps: [{recover: {schedule: {seed: -1}}}]", ("schedule.seed", "greater")),
        ("checkpoint: c\nsteps: [{recover: {schedule: {learning_rate: .nan}}}]", ("learning_rate",)),
        ("checkpoint: c\nsteps: [{recover: {losses: {objective: hope}}}]", ("losses.objective", "distill")),
        ("checkpoint: c\nsteps: [{recover: {losses: {temperature: 0}}}]", ("losses.temperature",)),
        ("checkpoint: c\nsteps: [{recover: {adapt: []}}]", ("recover.adapt", "at least 1")),
        ("checkpoint: c\nsteps: [{recover: {adapt: [heads]}}]", ("recover.adapt", "full-routers")),
        ("checkpoint: c\nsteps: [{recover: {schedule: {capacity: 0}}}]", ("schedule.capacity", "greater")),
        ("checkpoint: c\ntext: {split: mine}\nsteps: [{retop: {}}]", ("text.split", "calibration")),
        ("checkpoint: c\nreport_tokens: 0\nsteps: [{retop: {}}]", ("report_tokens", "greater")),
        ("checkpoint: nowhere\nsteps: [{retop: {}}]", ("nowhere does not exist", "give the folder")),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 100 else "",
)  # fmt: skip
def test_malformed_recipe(text: str, says: tuple[str, ...], out: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    refused(INPUT, "run", path, "-o", out, says=says)


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("steps: [{retop: {top_k: 3}}]", ("between 1 and", "2")),
        ("steps: [{retop: {}}, {retop: {top_k: 2}}]", ("line 2, column 30: steps.1.retop", "between 1 and", "1")),
        ("steps: [{profile: {}}, {prune: {keep: 1}}]", ("keep at least 2 experts",)),
        ("steps: [{profile: {}}, {prune: {keep: 6, ratio: 0.5}}]", ("one of them",)),
        ("steps: [{profile: {}}, {prune: {keep: 6, virtual: true}}]", ("needs a bias", "leave --virtual out")),
        ("steps: [{profile: {}}, {prune: {keep: 6}}, {profile: {}}, {prune: {keep: 7}}]", ("cannot keep 7", "has 6")),
        ("steps: [{retop: {}}, {recover: {adapt: [routers], losses: {objective: lm}}}]", ("top-1 Mixtral", "distill")),
        ("steps: [{retop: {}}, {recover: {adapt: [routers, full-routers]}}]", ("exclude each other",)),
        ("steps: [{retop: {}}, {recover: {save_adapter: a, adapt: [full-routers]}}]", ("are no adapter",)),
        ("steps: [{retop: {}}, {recover: {adapter: adalora, adapt: [experts]}}]", ("--adapt routers alone",)),
        (
            "steps: [{retop: {}}, {recover: {adapt: [routers], adapter: adalora, schedule: {rank: 9}}}]",
            ("lower --rank",),
        ),
        ("steps: [{retop: {}}, {recover: {log: steps.txt}}]", ("steps.txt", "no format")),
        ("running: {device: abacus}\nsteps: [{retop: {}}]", ("abacus",)),
        ("running: {dtype: int4}\nsteps: [{retop: {}}]", ("int4", "bfloat16")),
        ("text: {length: 4096}\nsteps: [{retop: {}}]", ("4096", "context")),
        ("text: {traces: ['builtin:klingon']}\nsteps: [{retop: {}}]", ("klingon", "python")),
        ("text: {traces: []}\nsteps: [{retop: {}}]", ("no traces", "builtin:all")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_recipe_that_asks_for_the_impossible(
    rest: str, says: tuple[str, ...], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before the first evaluation, not after an hour of work."""
    monkeypatch.setattr("moesurgeon.pipeline.evaluate.ready", pytest.fail)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"checkpoint: {MIXTRAL}\n{rest}\n")
    refused(USAGE, "run", path, "-o", out, says=says)


def test_recipe_that_is_no_file(out: Path, tmp_path: Path) -> None:
    refused(INPUT, "run", tmp_path / "nowhere.yaml", "-o", out, says=("cannot be read", "give the path"))
    refused(INPUT, "run", tmp_path, "-o", out, says=("cannot be read", "give the path"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    refused(INPUT, "run", tmp_path / "binary.yaml", "-o", out, says=("not valid YAML",))


def test_recipe_with_a_log_that_exists(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.evaluate.ready", pytest.fail)
    path, log = tmp_path / "recipe.yaml", tmp_path / "log.csv"
    log.write_text("mine")
    path.write_text(f"checkpoint: {MIXTRAL}\nsteps: [{{retop: {{}}}}, {{recover: {{log: {log}}}}}]\n")
    refused(USAGE, "run", path, "-o", out, says=("log.csv} exists", "remove it"))
    assert log.read_text() == "mine"
