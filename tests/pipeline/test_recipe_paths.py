"""Paths of a recipe: relative to its folder, wherever it is run from."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesurgeon.errors import InputError
from moesurgeon.pipeline.recipe import Recipe
from moesurgeon.pipeline.recipe_file import read_recipe


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe's folder; the working directory is another one."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "recipes"


def _read(home: Path, text: str) -> Recipe:
    (home / "r.yaml").write_text(text)
    return read_recipe(home / "r.yaml")


def test_every_path_is_relative_to_the_recipe(home: Path) -> None:
    recipe = _read(
        home,
        """
        checkpoint: model
        text: {traces: [a.jsonl, "code=b.txt", "c=sub/c.parquet:body", builtin:json, "js=builtin:logs"]}
        steps:
          - retop: {profile: p, heal: {traces: [h.txt], teacher: t}}
          - prune: {keep: 6, profile: q, curve_plot: x.png, run: stages, heal: {teacher: hf://org/name}}
          - prune: {keep_experts: ../k.json}
          - recover: {cache: c, log: l.csv, tensorboard: b, save_adapter: s}
        """,
    )
    assert recipe.checkpoint == str(home / "model")
    assert recipe.text.traces == (
        f"{home}/a.jsonl", f"code={home}/b.txt", f"c={home}/sub/c.parquet:body", "builtin:json", "js=builtin:logs"
    )  # fmt: skip
    retop, prune, other, recover = (step.retop or step.prune or step.recover for step in recipe.steps)
    assert retop.profile == home / "p" and retop.heal.traces == (f"{home}/h.txt",)
    assert retop.heal.teacher == str(home / "t")
    assert (prune.profile, prune.curve_plot, prune.run) == (home / "q", home / "x.png", home / "stages")
    assert prune.heal.teacher == "hf://org/name" and prune.heal.traces == ()
    assert other.keep_experts == home / "../k.json"
    assert (recover.cache, recover.log) == (home / "c", home / "l.csv")
    assert (recover.tensorboard, recover.save_adapter) == (home / "b", home / "s")


def test_what_leads_somewhere_from_anywhere_stays(home: Path) -> None:
    recipe = _read(
        home,
        "checkpoint: builtin:tiny-mixtral\ntext: {traces: [/data/a.txt, 'x=~/b.txt', ~/c.txt]}\n"
        "steps: [{prune: {keep: 6, profile: ~/p}}]\n",
    )
    assert recipe.checkpoint == "builtin:tiny-mixtral"
    assert recipe.text.traces == ("/data/a.txt", f"x={home.parent}/b.txt", f"{home.parent}/c.txt")
    assert recipe.steps[0].prune is not None and recipe.steps[0].prune.profile == home.parent / "p"
    assert _read(home, "checkpoint: hf://org/name\nsteps: [{retop: {}}]\n").checkpoint == "hf://org/name"


def test_a_path_with_an_equals_sign_or_a_colon_is_read_as_on_the_command_line(home: Path) -> None:
    (home / "lang=de").mkdir()
    for name in ("lang=de/a.jsonl", "b.jsonl", "c:d.jsonl"):
        (home / name).write_text("")
    traces = "['lang=de/a.jsonl', 'x=lang=de/a.jsonl', 'x=b.jsonl:body', 'c:d.jsonl', 'c:d.jsonl:body']"
    recipe = _read(home, f"checkpoint: c\ntext: {{traces: {traces}}}\nsteps: [{{retop: {{}}}}]\n")
    assert recipe.text.traces == (
        f"{home}/lang=de/a.jsonl", f"x={home}/lang=de/a.jsonl", f"x={home}/b.jsonl:body",
        f"{home}/c:d.jsonl", f"{home}/c:d.jsonl:body",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        ("checkpoint: here\nsteps: [{retop: {}}]", "line 1, column 13: checkpoint: here"),
        ("checkpoint: c\ntext: {traces: [here]}\nsteps: [{retop: {}}]", "line 2, column 17: text.traces.0: here"),
        ("checkpoint: c\ntext: {traces: ['a=here:body']}\nsteps: [{retop: {}}]", "text.traces.0: here:body"),
        ("checkpoint: c\nsteps: [{retop: {profile: here}}]", "steps.0.retop.profile: here"),
        ("checkpoint: c\nsteps: [{retop: {heal: {teacher: here}}}]", "steps.0.retop.heal.teacher: here"),
        ("checkpoint: c\nsteps: [{prune: {keep_experts: here}}]", "steps.0.prune.keep_experts: here"),
        ("checkpoint: c\nsteps: [{recover: {cache: here}}]", "steps.0.recover.cache: here"),
    ],
)
def test_what_is_only_in_the_working_directory_is_refused(recipe: str, place: str, home: Path) -> None:
    """Reading another file from another place would be worse."""
    Path("here").touch()
    with pytest.raises(InputError, match=f"{place} is in the working directory, and not in {home}") as raised:
        _read(home, recipe)
    assert "\n" not in str(raised.value)
    (home / "here").touch()
    _read(home, recipe)


def test_a_recipe_is_the_same_by_any_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _read(home, "checkpoint: model\nsteps: [{retop: {}}]")
    monkeypatch.chdir(home)
    assert read_recipe(Path("r.yaml")) == whole
    assert Path(read_recipe(Path("../recipes/r.yaml")).checkpoint).resolve() == Path(whole.checkpoint)
