"""What rules that name modules say of each expert, and whether it is still said of the same one after a prune.

A rule may name an expert by number or match some experts of a layer and not others. Pruning renumbers tensors, not
rules: where an expert that stays gets a number of which something else is said, the rule would be of another expert.
Names are taken as they come: on disk or in memory, with or without ``model.``, wildcards or regular expressions.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moesurgeon.errors import CheckpointError
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.rule_sets import (
    Counted,
    RuleSet,
    counted_beside,
    counted_in_config,
    rules_beside,
    rules_of_config,
)

Numbers = Mapping[int, Mapping[int, int]]
"""Layer -> old number -> new number of the experts that stay."""

_EVERY = -1
_NUMBER = re.compile(r"(?<!shared_)experts?[._/](\d{1,6})(?=$|[._/])(.*)", re.IGNORECASE)
_LAYER = re.compile(r"(?:^|[._/])(layers|blocks|h|mtp|mtp_block)[._/](\d{1,6})(?=[._/])")
_PREFIX = re.compile(r"^(re:|[+-]:)")
_SIGNS = re.compile(r"[*?\[\](){}|^$\\+]")
# A single sign that may stand for a digit: a class, an escape, a dot that is not between letters.
_MAY_BE_A_NUMBER = re.compile(r"\d|\\[dwDWSsb]|[\[{?]|(?<![A-Za-z])\.(?![*+])|\.(?![*+A-Za-z])")
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\d*\}")
_DIGITS = re.compile(r"(\\d|\[0-9\])[*+]")  # end where the number does
_NESTED = re.compile(r"\)[*+{]|\\[1-9]")
# What is tried at most: names times patterns, more for those that look back often. A hundred million took a minute.
_MOST_TRIES = 30_000_000
_WEIGHTS = (1, 1, 1, 5, 50)

Said = dict[tuple[int, int], set[tuple[str, str, str]]]
"""(Layer, expert) -> what is said of it: (which part, what it gets, the entry that says so)."""


class Unjudged(Exception):
    """A pattern of which it cannot be told what it matches; the argument is its entry."""


def refuse_renumbered(source: Anatomy, numbers: Numbers, root: Path | None = None) -> None:
    """Raise CheckpointError where a rule would be of another expert after ``numbers``.

    Of config.json, and of the files in ``root`` where it is given. Something with an entry per expert is refused too.
    """
    count = min((len(places) for places in numbers.values()), default=source.experts)
    for rule in _rules(source, root):
        if entry := renumbered(rule, source, source.experts, numbers):
            raise CheckpointError(
                f"{_where(rule)} names experts by number ({entry[:80]!r}), and this prune gives them other numbers: "
                "write rules for all experts of a layer, or prune before quantising"
            )
    if count < source.experts:
        for counted in _counted(source, root):
            raise CheckpointError(
                f"{_where(counted)} has an entry for each of the {source.experts} experts, which this prune does not "
                "cut: move it away, or prune first and make it again"
            )


def refuse_told_apart(source: Anatomy, root: Path) -> None:
    """Raise CheckpointError where a rule tells experts apart: for a prune that does not know yet who stays."""
    for line in told_apart(source, root):
        raise CheckpointError(f"{line}: write rules for all experts of a layer, or say with --keep-experts who stays")


def still_numbered(result: Anatomy, before: int, numbers: Numbers, root: Path) -> str | None:
    """Say which rules of a result still count the ``before`` experts of its source; None where none do."""
    for rule in _rules(result, root):
        if entry := renumbered(rule, result, before, numbers):
            return f"{_where(rule)} names experts by their numbers before the prune ({entry[:80]!r})"
    return None


def told_apart(source: Anatomy, root: Path) -> Iterator[str]:
    """Yield a line for each set of rules that says something of some experts of a layer and not of others."""
    for rule in _rules(source, root):
        if entry := _apart(rule, source):
            yield f"{_where(rule)} names experts by number ({entry[:80]!r}), which prune does not rewrite"
    for counted in _counted(source, root):
        yield f"{_where(counted)} has an entry for each of the {source.experts} experts, which prune does not cut"


def not_pruned(source: Anatomy, root: Path) -> Iterator[str]:
    """Yield a line for all that makes prune refuse ``source`` whatever is kept, or unless numbers stay."""
    for name, _role in source.of_kind("unclear"):
        shape = list(source.tensors[name].shape)
        yield f"{name} has shape {shape} and may count the {source.experts} experts: prune refuses, it cannot tell"
    yield from told_apart(source, root)


def renumbered(rule: RuleSet, source: Anatomy, experts: int, numbers: Numbers) -> str | None:
    """Return an entry of ``rule`` that is of another expert after ``numbers``; None where all mean what they did.

    ``experts``: how many there were before.
    """
    try:
        readings = _readings(rule, source, experts)
    except Unjudged as unjudged:
        moves = any(old != new for places in numbers.values() for old, new in places.items())
        return str(unjudged) if moves else None
    for said in filter(None, readings):
        for layer, places in numbers.items():
            for old, new in places.items():
                if old != new and (entry := _difference(said, layer, old, new)):
                    return entry
    return None


def _rules(source: Anatomy, root: Path | None) -> list[RuleSet]:
    return [*rules_of_config(source.config), *([] if root is None else rules_beside(root))]


def _counted(source: Anatomy, root: Path | None) -> list[Counted]:
    family = source.family
    known = {key.rpartition(".")[2] for key in (*family.experts_keys, *family.top_k_keys)}
    found = counted_in_config(source.config, source.experts, known)
    return [*found, *([] if root is None else counted_beside(root, source.experts))]


def _where(found: RuleSet | Counted) -> str:
    return f"{found.file}: {found.key}" if found.key else found.file


def _apart(rule: RuleSet, source: Anatomy) -> str | None:
    try:
        readings = _readings(rule, source, source.experts)
    except Unjudged as unjudged:
        return str(unjudged)
    for said in filter(None, readings):
        for layer in source.routed_layers:
            for expert in range(1, source.experts):
                if entry := _difference(said, layer, 0, expert):
                    return entry
    return None


def _difference(said: Said, layer: int, one: int, other: int) -> str | None:
    """Return an entry that says of one of two numbers what none says of the other."""
    first, second = (said.get((layer, number), set()) | said.get((_EVERY, number), set()) for number in (one, other))
    if first == second:
        return None
    values = [{(part, given) for part, given, _entry in found} for found in (first, second)]
    differing = values[0] ^ values[1]
    return next((entry for part, given, entry in sorted(first | second) if (part, given) in differing), None)


def _readings(rule: RuleSet, source: Anatomy, experts: int) -> list[Said]:
    """Return what is said of each expert in the two ways of reading a number at an entry's end: whole, or beginning.

    Some loaders compare names, some look for the entry in them, and then 1 is 1, 10 and 11.
    """
    whole: Said = {}
    begun: Said = {}
    patterns: list[tuple[str, str]] = []
    for entry, given in rule.entries:
        plain, is_open = _plain(entry), _is_open(entry)
        if not _SIGNS.search(plain):
            if match := _NUMBER.search(plain):
                layer, expert, part = _layer_of(plain[: match.start()], source), int(match[1]), match[2].lstrip("./_")
                whole.setdefault((layer, expert), set()).add((part, given, entry))
                ends_there = not part and (is_open or entry == plain)
                for number in range(experts) if ends_there else (expert,):
                    if not ends_there or str(number).startswith(match[1]):
                        begun.setdefault((layer, number), set()).add((part, given, entry))
        elif _MAY_BE_A_NUMBER.search(_PREFIX.sub("", entry).replace("\\.", "")):
            patterns.append((entry, given))
    if patterns:
        for key, part, given, entry in _matched(patterns, source, experts):
            for said in (whole, begun):
                said.setdefault(key, set()).add((part, given, entry))
    return [whole, begun]


def _plain(entry: str) -> str:
    """Return a pattern without what is open at its ends, and without escapes of dots."""
    text = _PREFIX.sub("", entry).replace("\\.", ".").removeprefix("^").removesuffix("$")
    while text.startswith((".*", "*")):
        text = text.removeprefix(".*").removeprefix("*")
    while text.endswith("*"):
        text = text.removesuffix("*").removesuffix(".")
    return text


def _is_open(entry: str) -> bool:
    return entry.endswith("*") or (bool(_PREFIX.match(entry)) and not entry.endswith("$"))


def _layer_of(prefix: str, source: Anatomy) -> int:
    if not (match := _LAYER.search(prefix)):
        return _EVERY
    return int(match[2]) + (source.layers if match[1].startswith("mtp") else 0)


def _matched(
    patterns: Sequence[tuple[str, str]], source: Anatomy, experts: int
) -> Iterator[tuple[tuple[int, int], str, str, str]]:
    """Yield ((layer, expert), part, what it gets, entry) for every match of a pattern that has to be tried."""
    names = list(_names(source, experts))
    tries = 0
    for entry, given in patterns:
        tries += len(names) * _weight_of(entry)
        if tries > _MOST_TRIES:
            raise Unjudged(entry)
        for pattern in _compiled(entry):
            for layer, expert, part, name in names:
                if pattern.match(name):
                    yield (layer, expert), part, given, entry


def _weight_of(entry: str) -> int:
    """Return how long a pattern may take; raises Unjudged for one that could take for ever."""
    text = _PREFIX.sub("", entry)
    unbounded = len(_UNBOUNDED.findall(_DIGITS.sub("", text)))
    if len(text) > 500 or unbounded >= len(_WEIGHTS) or _NESTED.search(text):
        raise Unjudged(entry)
    return _WEIGHTS[unbounded]


def _compiled(entry: str) -> list[re.Pattern[str]]:
    """Return ``entry`` as the regular expression that it is; without a prefix that says so as wildcards, too."""
    text = _PREFIX.sub("", entry)
    found = [] if _PREFIX.match(entry) else [re.compile(fnmatch.translate(text))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may come to mean something else in Python
            return [*found, re.compile(text)]
    except (re.error, OverflowError, RecursionError):
        if found:
            return found
        raise Unjudged(entry) from None


def _names(source: Anatomy, experts: int) -> Iterator[tuple[int, int, str, str]]:
    """Yield (layer, expert, part, name) of what rules may call the modules and tensors of experts."""
    layouts = source.family.layouts
    stored = next((layout for layout in layouts if layout.expert), None)
    template = (stored and stored.expert) or "{block}.experts.{expert}."
    parts = list(dict.fromkeys((stored or source.layout).projections.values()))
    blocks = list(dict.fromkeys(layout.block for layout in (*layouts, source.family.in_memory)))
    for layer in source.routed_layers:
        for block in blocks:
            whole = source.name_in(layer, template.replace("{block}", block))
            for prefix in dict.fromkeys((whole, whole.removeprefix("model."))):
                for expert in range(experts):
                    module = prefix.replace("{expert}", str(expert))
                    yield layer, expert, "", module.removesuffix(".")
                    for part in parts:
                        yield layer, expert, part, module + part
                        yield layer, expert, f"{part}.weight", f"{module}{part}.weight"
