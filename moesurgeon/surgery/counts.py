"""Where config.json counts experts: every place that an edit has to write, so that all readers agree.

A count may stand under several names, on two levels (the top and ``text_config``), and in objects of other tools. The
names are those of all families: runtimes look for them in an order of their own, whatever the model. Names that other
tools use are edited where they hold the same number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moesurgeon.errors import CheckpointError
from moesurgeon.families import FAMILIES
from moesurgeon.families.keys import OTHER_EXPERT_COUNTS, OTHER_TOP_KS, is_present, value_at
from moesurgeon.surgery.anatomy import Anatomy

_EXPERTS = frozenset(key.rpartition(".")[2] for family in FAMILIES for key in family.experts_keys)
_TOP_K = frozenset(key.rpartition(".")[2] for family in FAMILIES for key in family.top_k_keys)
# What may count experts under a name that is not known, and what has "expert" in its name and counts something else.
_MAYBE = re.compile(r"expert")
_NO_COUNT = re.compile(
    r"tok|top|shared|group|layer|size|dim|width|period|freq|offset|step|start|select|activ|used|capacity"
)
# Of the model that reads text: said there twice, it has to be said alike.
_LEVELS = ("", "text_config", "llm_config", "language_config")
_PER_LAYER = "per_layer_config."
# Of other models in the same config, which have experts of their own.
_OTHERS = re.compile(r"vision|visual|image|video|audio|speech|talker|draft|speculat|encoder")
_DEEPEST = 64


def expert_counts(source: Anatomy) -> list[str]:
    """Return the dotted keys of config.json that hold the number of experts.

    Raises CheckpointError where one of them holds another number.
    """
    return _places(source, source.family.experts_keys, _EXPERTS, source.experts, OTHER_EXPERT_COUNTS)


def top_k_counts(source: Anatomy) -> list[str]:
    """Return the dotted keys of config.json that hold the number of experts per token, or a list of it by layer.

    Raises CheckpointError where one of them holds another number.
    """
    return _places(source, source.family.top_k_keys, _TOP_K, source.top_k, OTHER_TOP_KS)


def unknown_counts(source: Anatomy) -> list[str]:
    """Return a line for each key of config.json that may count experts by its name and value, and stays as it is."""
    known = {*expert_counts(source), *top_k_counts(source)}
    return [
        f"config.json has {key} = {value}: it may count experts, and is copied as it is; edit it if it does"
        for key, value in _counts_in(source.config, _MAYBE.search)
        if key not in known and _may_count(key, value, source.experts)
    ]


def _may_count(key: str, value: Any, experts: int) -> bool:
    if isinstance(value, list):
        return len(value) > 1 and all(type(each) is int and each == experts for each in value)
    return type(value) is int and value == experts and not _NO_COUNT.search(key.rpartition(".")[2])


def _places(
    source: Anatomy, own: tuple[str, ...], names: frozenset[str], count: int, others: tuple[str, ...]
) -> list[str]:
    present = [key for key in own if is_present(source.config, key)]
    lists = [value for key in present if isinstance(value := value_at(source.config, key), list)]
    home = own[0].rpartition(".")[0]
    for key, value in _counts_in(source.config, lambda name: name in names or name in others):
        if key in own or value is None or isinstance(value, bool):
            continue
        if value == count or value in lists:
            present.append(key)
        elif key.rpartition(".")[2] in others:
            continue  # it may count something else
        elif type(value) is int and value > 0 and _must_agree(key, home):
            said = next(key for key in own if value_at(source.config, key) is not None)
            raise CheckpointError(
                f"config.json contradicts itself: {said} = {count} and {key} = {value}; remove the one that is wrong"
            )
    return present


def _must_agree(key: str, home: str) -> bool:
    level = key.rpartition(".")[0]
    return level in _LEVELS or level == home or key.startswith(_PER_LAYER)


def _counts_in(
    config: Mapping[str, Any], is_one: Callable[[str], object], level: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in the config of this model whose name ``is_one``."""
    for key, value in config.items():
        if "." in key or _OTHERS.search(key) or depth > _DEEPEST:
            continue  # a key with a dot is the name of a module
        path = f"{level}.{key}" if level else key
        if is_one(key):
            yield path, value
        elif isinstance(value, Mapping):
            yield from _counts_in(value, is_one, path, depth + 1)
