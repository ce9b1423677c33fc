"""The YAML of a recipe, read strictly: where every value stands, no key twice, and no surprising type.

YAML 1.1 reads 010 as 8, 1:30 as 90 and 2024-01-01 as a date; those are refused. 1e-4, which it reads as text, is the
number that everybody means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moesurgeon.errors import InputError

_MOST = 100_000  # values after aliases are written out: an alias of aliases is small on the disk only
_MERGE = "tag:yaml.org,2002:merge"
_ODD = {  # what YAML takes plain words for, to everybody's surprise
    "tag:yaml.org,2002:int": (re.compile(r"[-+]?0[0-7_]+|[-+]?[0-9_]+(:[0-9_]+)+"), "is another number in YAML"),
    "tag:yaml.org,2002:float": (re.compile(r"[-+]?[0-9_]+(:[0-9_]+)+\.[0-9_]*"), "is another number in YAML"),
    "tag:yaml.org,2002:timestamp": (re.compile(".*"), "is a date in YAML"),
}


Place = Sequence[str | int]
"""Keys and numbers that lead to a value, from the outermost on."""


class _Loader(yaml.SafeLoader):
    """``yaml.SafeLoader``, which also knows 1e-4 and 1.5e3 for numbers, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class RecipeText:
    """What the YAML in ``path`` stands for, ``value``; ``node`` remembers where each of it is written."""

    path: Path
    value: Any
    node: yaml.Node | None

    def at(self, keys: Place, *, key: bool = False) -> str:
        """Return file, line and column of what is under ``keys``, as far as there is such; ``key``: of its last key."""
        node, mark = self.node, self.node.start_mark if self.node else None
        for name in keys:
            found = _under(node, name)
            if found is None:
                break
            node = found[1]
            mark = found[0].start_mark if key else node.start_mark
        return f"{self.path}" if mark is None else f"{self.path}, line {mark.line + 1}, column {mark.column + 1}"


def read_recipe_text(path: Path) -> RecipeText:
    """Read the YAML in ``path``; InputError, with the line, for what is not read the way it looks."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return RecipeText(path, None, None)
        _refuse_odd(path, node)
        return RecipeText(path, _plain(loader.construct_document(node)), node)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give the path of a recipe") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML ({' '.join(str(error).split())[:200]}); correct it") from error


def _plain(value: Any) -> Any:
    """Return ``value`` if it can be written as JSON; ValueError for sets, bytes and the like."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise ValueError(f"a recipe holds text, numbers, lists and keys; {error}") from error
    return value


def _refuse_odd(path: Path, root: yaml.Node) -> None:
    """Raise InputError for a key that comes twice or is no text, and for plain words that YAML reads as something else.

    Merged keys (``<<``) may be said again: that is what they are for.
    """
    sizes: dict[int, int] = {}

    def refuse(node: yaml.Node, what: str) -> None:
        mark = node.start_mark
        raise InputError(f"{path}, line {mark.line + 1}, column {mark.column + 1}: {what}")

    def visit(node: yaml.Node) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                refuse(node, "this refers to itself; write it out")
            return sizes[id(node)]
        sizes[id(node)] = 0
        if isinstance(node, yaml.ScalarNode):
            odd = _ODD.get(node.tag)
            if odd and node.style is None and odd[0].fullmatch(node.value):
                refuse(node, f"{node.value} {odd[1]}; put it in quotes, or write the number that is meant")
            size = 1
        elif isinstance(node, yaml.MappingNode):
            known: dict[str, int] = {}
            for key, _value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode) or key.tag not in ("tag:yaml.org,2002:str", _MERGE):
                    refuse(key, f"{str(key.value)[:40]!r} cannot be a key; put it in quotes")
                if key.value in known:
                    refuse(key, f"the key {key.value} comes twice, first in line {known[key.value]}; keep one of them")
                known[key.value] = line
            size = 1 + sum(visit(value) for _key, value in node.value)
        else:
            size = 1 + sum(map(visit, node.value))
        if size > _MOST:
            refuse(node, f"with its aliases this holds more than {_MOST:,} values, which no recipe needs")
        sizes[id(node)] = size
        return size

    visit(root)


def _under(node: yaml.Node | None, name: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """Return the key and the value under ``name``, also of what is merged; the items of lists are their own keys."""
    if isinstance(node, yaml.SequenceNode) and isinstance(name, int) and name < len(node.value):
        return node.value[name], node.value[name]
    if not isinstance(node, yaml.MappingNode):
        return None
    for key, value in node.value:  # construct_document puts what is merged first; what is said here wins
        if key.tag != _MERGE and key.value == name and not _is_merged(node, key):
            return key, value
    return next(((key, value) for key, value in node.value if key.value == name), None)


def _is_merged(node: yaml.MappingNode, key: yaml.Node) -> bool:
    return not node.start_mark.index <= key.start_mark.index < node.end_mark.index
