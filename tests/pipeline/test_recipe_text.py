"""The YAML of recipes: no key twice, nothing that YAML reads as something else, numbers that are numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import InputError
from moesurgeon.pipeline.options import HealSpec
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recipe import Recipe
from moesurgeon.pipeline.recipe_file import read_recipe


def _read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("checkpoint: c\nsteps: []\nsteps: [{retop: {}}]", "line 3, column 1: the key steps comes twice, first in"),
        ("checkpoint: c\nsteps:\n- retop: {top_k: 2, top_k: 1}", "line 3, column 21: the key top_k comes twice"),
        ("checkpoint: c\ntext: {budgets: {a: 9,\n a: 10}}\nsteps: [{retop: {}}]", "line 3, column 2: the key a comes"),
        ("checkpoint: c\nx: &x {a: 1}\ny: {<<: *x, <<: *x}", "the key << comes twice"),
        ("checkpoint: c\nsteps: [{retop: {top_k: 010}}]", "column 25: 010 is another number in YAML"),
        ("checkpoint: c\nreport_tokens: 1:30\nsteps: []", "1:30 is another number in YAML"),
        ("checkpoint: 2024-01-01\nsteps: []", "2024-01-01 is a date in YAML; put it in quotes"),
        ("checkpoint: 2024-13-45\nsteps: []", "2024-13-45 is a date in YAML"),
        ("checkpoint: c\nsteps: [{retop: {top_k: 1e0}}]", "top_k must be a whole number, not 1.0"),
        ("checkpoint: c\nsteps: [{retop: {top_k: '1'}}]", 'top_k must be a whole number, not "1"'),
        ("checkpoint: c\nsteps: [{retop: {top_k: 2.0}}]", "top_k must be a whole number, not 2.0"),
        ("checkpoint: no\nsteps: [{retop: {}}]", "checkpoint must be text, not false; put it in quotes"),
        ("checkpoint: c\ntext: {traces: builtin:all}\nsteps: [{retop: {}}]", "text.traces must be a list"),
        ("checkpoint: c\ntext: {budgets: {1: 9}}\nsteps: [{retop: {}}]", "'1' cannot be a key; put it in quotes"),
        ("checkpoint: c\ntext: {budgets: {yes: 9}}\nsteps: [{retop: {}}]", "'yes' cannot be a key"),
        ("checkpoint: c\n? [a]\n: 1", "cannot be a key"),
        ("checkpoint: c\nsteps: &a [*a]", "line 2, column 8: this refers to itself"),
        ("checkpoint: !!binary aGk=\nsteps: []", "text, numbers, lists and keys"),
        ("checkpoint: c\nsteps: [{prune: {keep: 6, heal: {traces: [a], methd: ridge}}}]", "did you mean method"),
        ("checkpoint: c\nsteps: [{prune: {xyzzy: 6}}]", "name one of .*keep_experts"),
        ("checkpoint: c\nsteps: [{recovr: {}}]", "steps.0.recovr: .*did you mean recover"),
    ],
)  # fmt: skip
def test_what_is_not_read_as_it_looks_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as raised:
        _read(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "recipe.yaml")) and "\n" not in str(raised.value)


def test_an_alias_of_aliases_is_refused_before_it_is_written_out(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    with pytest.raises(InputError, match="with its aliases this holds more than 100,000 values"):
        _read(tmp_path, "\n".join(["checkpoint: c", *lines]))


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    """What is merged may be said again, which is what merging is for."""
    recipe = _read(
        tmp_path,
        """
        checkpoint: c
        steps:
          - profile: {max_tokens: 64}
          - prune: &first
              keep: 6
              heal: &heal {method: ridge, max_tokens: 900}
          - profile: {max_tokens: 64}
          - prune: {<<: *first, keep: 5}
          - retop: {top_k: 1, heal: *heal}
        """,
    )
    heal = HealSpec(method="ridge", max_tokens=900)
    assert recipe.steps[1].prune == PruneSpec(keep=6, heal=heal)
    assert recipe.steps[3].prune == PruneSpec(keep=5, heal=heal)
    assert recipe.steps[4].heal == heal


def test_an_error_in_what_is_merged_names_its_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 4, column 16: steps\.2\.retop\.keep: there is no such key"):
        _read(
            tmp_path,
            "checkpoint: c\nsteps:\n- profile:\n- prune: &cut {keep: 6}\n- retop: {top_k: 1, <<: *cut}\n",
        )


@pytest.mark.parametrize("rate", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4", ".1e-3"])
def test_a_rate_may_be_written_as_everybody_does(rate: str, tmp_path: Path) -> None:
    recipe = _read(tmp_path, f"checkpoint: c\nsteps: [{{recover: {{schedule: {{learning_rate: {rate}}}}}}}]")
    assert recipe.steps[0].recover is not None and recipe.steps[0].recover.schedule.learning_rate == 1e-4


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    recipe = _read(tmp_path, "checkpoint: c\nsteps: [{recover: {losses: {lm: 1}, changed: 0}}]")
    assert recipe.steps[0].recover is not None and recipe.steps[0].recover.losses.lm == 1.0


def _numbers(schema: dict[str, Any], part: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield where a recipe takes a number and neither text nor true."""
    if "$ref" in part:
        yield from _numbers(schema, schema["$defs"][part["$ref"].rpartition("/")[2]], place)
        return
    kinds = {part.get("type"), *(choice.get("type") for choice in part.get("anyOf", ()))}
    if kinds & {"integer", "number"} and not kinds & {"string", "boolean"}:
        yield place
    for choice in part.get("anyOf", ()):
        if "$ref" in choice:
            yield from _numbers(schema, choice, place)
    for name, inner in part.get("properties", {}).items():
        yield from _numbers(schema, inner, (*place, name))
    if isinstance(part.get("items"), dict):
        yield from _numbers(schema, part["items"], (*place, "0"))


_SCHEMA = Recipe.model_json_schema()
NUMBERS = list(_numbers(_SCHEMA, _SCHEMA))


def test_the_numbers_of_recipes_are_found() -> None:
    found = {".".join(place) for place in NUMBERS}
    assert {"report_tokens", "text.max_tokens", "steps.0.retop.top_k", "steps.0.prune.heal.pace.steps"} <= found
    assert len(found) > 50


@pytest.mark.parametrize("value", [True, "1000"])
@pytest.mark.parametrize("place", NUMBERS, ids=".".join)
def test_no_number_is_true_or_text(place: tuple[str, ...], value: object, tmp_path: Path) -> None:
    said: Any = value
    for name in reversed(place):
        said = [said] if name == "0" else {name: said}
    recipe = {"checkpoint": "c", "steps": [{"retop": {}}], **said}
    with pytest.raises(InputError, match=r" must be a (whole )?number, not "):
        _read(tmp_path, json.dumps(recipe))
