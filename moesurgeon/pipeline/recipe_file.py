"""From the file of a recipe to a recipe: strict types, and errors that name the place and the nearest known key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moesurgeon.errors import InputError
from moesurgeon.pipeline.recipe import Recipe
from moesurgeon.pipeline.recipe_paths import located
from moesurgeon.pipeline.recipe_text import RecipeText, read_recipe_text

_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "keys with values",
}


def read_recipe(path: Path) -> Recipe:
    """Read and check the recipe in ``path``; InputError with the first thing that is wrong."""
    return recipe_of(read_recipe_text(path))


def recipe_of(text: RecipeText) -> Recipe:
    """Return the recipe that ``text`` stands for; InputError with the first thing that is wrong."""
    try:
        # As JSON: there a list is a tuple and text is a path, and yet true is no number and "3" is none.
        recipe = Recipe.model_validate_json(json.dumps(_with_defaults(text.value)), strict=True)
    except ValidationError as error:
        raise InputError(_what_is_wrong(error.errors(include_url=False)[0], text)) from error
    return located(recipe, text)


def _with_defaults(value: Any) -> Any:
    """Return ``value`` with the defaults of steps with nothing behind their name, such as ``- profile:``."""
    if not isinstance(value, dict) or not isinstance(value.get("steps"), list):
        return value
    steps = [
        {name: {} if given is None else given for name, given in step.items()} if isinstance(step, dict) else step
        for step in value["steps"]
    ]
    return {**value, "steps": steps}


def _what_is_wrong(first: ErrorDetails, text: RecipeText) -> str:
    """Say in a line where the first problem of a recipe is and what it is."""
    place = first["loc"]
    where = ".".join(map(str, place)) or "the recipe"
    given = json.dumps(first["input"], ensure_ascii=False, default=str)[:60]
    at = f"{text.at(place, key=first['type'] in _UNKNOWN_KEY)}: {where}"
    match first["type"]:
        case kind if kind in _UNKNOWN_KEY:
            return f"{at}: there is no such key; {_nearest(str(place[-1]), place[:-1])}"
        case "missing" | "missing_keyword_only_argument":
            return f"{at} is missing; add it"
        case "model_type" | "dataclass_type":
            return f"{at} must be keys with values, not {given}; see the recipes for examples"
        case "value_error":
            return f"{at}: {first['ctx']['error']}"
        case kind if kind in _KINDS:
            quote = isinstance(first["input"], bool | int | float) and kind in ("string_type", "path_type")
            hint = "put it in quotes" if quote else "correct it"
            return f"{at} must be {_KINDS[kind]}, not {given}; {hint}"
        case _:
            return f"{at}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {given}"


def _nearest(name: str, place: tuple[str | int, ...]) -> str:
    """Say which of the keys that may stand in ``place`` is like ``name``, or all of them."""
    known = _keys_in(place)
    found = difflib.get_close_matches(name, known, n=1)
    if found:
        return f"did you mean {found[0]}?"
    return f"remove it, or name one of {', '.join(known)}" if known else "remove it or correct its name"


def _keys_in(place: tuple[str | int, ...]) -> list[str]:
    """Return the keys that may stand in ``place`` of a recipe, by its schema; none where any may."""
    schema = Recipe.model_json_schema()
    definitions: Mapping[str, Any] = schema["$defs"]

    def resolved(part: Any) -> Any:
        if "$ref" in part:
            return resolved(definitions[part["$ref"].rpartition("/")[2]])
        choices = [resolved(choice) for choice in part.get("anyOf", ())]
        return next((choice for choice in choices if "properties" in choice), part)

    part = resolved(schema)
    for name in place:
        part = resolved(part.get("items", {}) if isinstance(name, int) else part.get("properties", {}).get(name, {}))
    return list(part.get("properties", {}))
