"""Lists and rules that name modules, in config.json and in the files beside it: which there are.

A quantiser's ``ignore``, ``modules_to_not_convert``, ``dynamic`` or ``targets``, a table from module to bits, a recipe:
whatever its key, a list or object of strings that speak of modules is a set of rules. What is counted by expert
without naming modules (placements, loads) is told by its key and its length.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.auxiliary import auxiliary_files
from moesurgeon.checkpoint.open import CONFIG_NAME
from moesurgeon.errors import CheckpointError
from moesurgeon.families.keys import MAX_COUNT

_PATTERNS = re.compile(r"^(re:|[+-]:)|[*?\[(|^$\\+]")
_OF_EXPERTS = re.compile(r"experts?[._/]\d|[./]experts?[./]", re.IGNORECASE)
# Files that are about quantisation by their name; of others, those that speak of experts.
_QUANTISERS = re.compile(r"quant|recipe|compress|sparse|eplb|imatrix|bits", re.IGNORECASE)
_TEXTS = ("*.json", "*.jsonl", "*.yaml", "*.yml", "*.toml")
# Of the tokenizer, whose words are no modules.
_NO_RULES = ("tokenizer*.json", "vocab.json", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_WORD = re.compile(r"[^\s'\",]*experts?[._/\\][^\s'\",]*", re.IGNORECASE)
_COUNTED = re.compile(r"expert|eplb|logical|physical", re.IGNORECASE)
_MOST_BYTES = 100_000_000
_DEEPEST = 64


@dataclass(frozen=True, slots=True)
class RuleSet:
    """What ``file`` says under ``key``: entries (which modules, what it gives them; "" in a plain list)."""

    file: str
    key: str
    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Counted:
    """Something under ``key`` of ``file`` with as many entries as there are experts."""

    file: str
    key: str


def rules_of_config(config: Mapping[str, Any]) -> list[RuleSet]:
    """Return the rules in a config.json."""
    return list(_rules_in(config, CONFIG_NAME, ""))


def counted_in_config(config: Mapping[str, Any], experts: int, known: Iterable[str]) -> list[Counted]:
    """Return what a config.json has with an entry for each of ``experts``; keys that are ``known`` are not."""
    return list(_counted_in(config, CONFIG_NAME, "", experts, frozenset(known)))


def rules_beside(root: Path) -> list[RuleSet]:
    """Return the rules in the files beside config.json that a copy of the folder ``root`` has as well."""
    return [rule for name, content in _contents(root) for rule in _rules_of_content(name, content)]


def counted_beside(root: Path, experts: int) -> list[Counted]:
    """Return what the files beside config.json have with an entry for each of ``experts``."""
    return [
        found
        for name, content in _contents(root)
        if not isinstance(content, str)
        for found in _counted_in(content, name, "", experts, frozenset())
    ]


def _contents(root: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, what it holds) of the files that may have rules: parsed where it is JSON, else the text."""
    for path in auxiliary_files(root):
        if not _is_any(path.name, _TEXTS) or _is_any(path.name, _NO_RULES):
            continue
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise CheckpointError(f"{path.name} is too large to be searched for expert numbers; move it away")
            raw = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        if not _QUANTISERS.search(path.name) and b"expert" not in raw.lower():
            continue
        text = raw.decode(errors="replace")
        try:
            yield path.name, json.loads(text) if path.suffix == ".json" else text
        except (ValueError, RecursionError):
            yield path.name, text


def _rules_of_content(name: str, content: Any) -> Iterator[RuleSet]:
    if not isinstance(content, str):
        yield from _rules_in(content, name, "")
        return
    # No structure that is known: what is said of one expert only is said by how often it is named.
    words = [_unquoted(word) for word in _WORD.findall(content)]
    if words:
        yield RuleSet(name, "", tuple((word, "named") for word in words))


def _unquoted(word: str) -> str:
    """Return a word of a text without the brackets of the list that it stands in."""
    word = word.rstrip(":")
    for opening, closing in ("[]", "{}"):
        if word.count(opening) > word.count(closing):
            word = word.removeprefix(opening)
        elif word.count(closing) > word.count(opening):
            word = word.removesuffix(closing)
    return word


def _rules_in(value: Any, file: str, key: str, depth: int = 0) -> Iterator[RuleSet]:
    if depth > _DEEPEST:
        return
    entries: list[tuple[str, str]] = []
    inner: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        # Keys that are rules give what is under them; under the others there may be more.
        entries = [(name, json.dumps(given, sort_keys=True)) for name, given in value.items() if _may_name(name)]
        inner = [(f"{key}.{name}" if key else name, given) for name, given in value.items()]
        named = tuple((given, "") for given in value.values() if isinstance(given, str) and _may_name(given))
        if named:
            yield RuleSet(file, key, named)
    elif isinstance(value, list):
        inner = [(key, item) for item in value if isinstance(item, dict | list)]
        for item in value:
            if isinstance(item, str) and _may_name(item):
                entries.append((item, ""))
            elif isinstance(item, dict):
                entries += _as_entries(item)
        if entries:
            inner = [(path, item) for path, item in inner if not (isinstance(item, dict) and _as_entries(item))]
    if entries:
        yield RuleSet(file, key, tuple(entries))
    for path, given in inner:
        yield from _rules_in(given, file, path, depth + 1)


def _as_entries(item: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rule that an object in a list is: a module under some key, what it gets under the others."""
    return [
        (name, json.dumps({key: given for key, given in item.items() if key != at}, sort_keys=True))
        for at, name in item.items()
        if isinstance(name, str) and _may_name(name)
    ]


def _may_name(text: str) -> bool:
    return bool(_OF_EXPERTS.search(text) or _PATTERNS.search(text))


def _counted_in(
    value: Any, file: str, key: str, experts: int, known: frozenset[str], depth: int = 0, *, counts: bool = False
) -> Iterator[Counted]:
    """Yield what has an entry per expert under a key that speaks of experts."""
    if depth > _DEEPEST or experts < 2:
        return
    if isinstance(value, dict):
        if counts and len(value) >= experts and _numbers(value) >= set(range(experts)):
            yield Counted(file, key)
            return
        for name, given in value.items():
            if name not in known:
                path = f"{key}.{name}" if key else name
                # The name of a module is no such key: its rules are told by _rules_in.
                speaks = counts or bool(_COUNTED.search(name) and not _OF_EXPERTS.search(name))
                yield from _counted_in(given, file, path, experts, known, depth + 1, counts=speaks)
    elif isinstance(value, list):
        plain = all(isinstance(item, int | float) for item in value)
        if counts and plain and (len(value) == experts or _is_placement(value, experts)):
            yield Counted(file, key)
            return
        for item in value:
            found = list(_counted_in(item, file, key, experts, known, depth + 1, counts=counts))
            yield from found[:1]
            if found:
                return


def _is_placement(value: list[Any], experts: int) -> bool:
    """Whether a list names every expert at least once: where each of them is, copies included."""
    return len(value) > experts and set(value) == set(range(experts))


def _numbers(value: Mapping[str, Any]) -> set[int]:
    return {int(name) for name in value if name.isascii() and name.isdigit() and int(name[:7]) <= MAX_COUNT}


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
