"""How much of each trace is read, and how much it counts: budgets and weights by domain, as they are written.

On the command line ``--budget code=200k --weight chat=2``, in a recipe ``budgets: {code: 200k}, weights: {chat: 2}``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from moesurgeon.errors import UsageError

SHORTEST = 8  # tokens of a window; fewer say little, and are mostly special tokens

_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKmMgG]?)")
_SCALES = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def named_values(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Return what ``NAME=VALUE`` texts say, by name; UsageError for another form and for a name that comes twice.

    >>> named_values("--budget", ["code=200k", "chat=1M"])
    {'code': '200k', 'chat': '1M'}
    """
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} {text} is not of the form NAME=VALUE; NAME is a trace's, as in NAME=PATH")
        if name in values:
            raise UsageError(f"{option} is given twice for {name}; give it once")
        values[name] = value
    return values


def token_count(value: str | int) -> int:
    """Return a number of tokens, which may be written with k, M or G (1000, not 1024).

    >>> token_count("200k"), token_count("1.5M"), token_count(4096)
    (200000, 1500000, 4096)
    """
    found = _COUNT.fullmatch(str(value).strip())
    # In decimals: 2.3 * 1000 is less than 2300 in floats.
    count = Decimal(found[1]) * _SCALES[found[2].lower()] if found and len(found[1]) < 16 else Decimal(0)
    if count < SHORTEST or count != int(count):
        raise UsageError(f"{value!r} is no budget: give a number of tokens from {SHORTEST} on, such as 50000 or 200k")
    return int(count)


def shares_of(
    domains: Sequence[str], max_tokens: int | None, budgets: Mapping[str, str | int]
) -> dict[str, int | None]:
    """Return how many tokens are read of each domain at most; None: all there are.

    A domain with a budget has that. ``max_tokens`` is for the others together and divided evenly among them; what a
    short trace leaves is not given to the others, so that a domain's share does not depend on its neighbours.

    >>> shares_of(["code", "chat", "logs"], 1001, {"chat": "5k"})
    {'code': 501, 'chat': 5000, 'logs': 500}
    """
    _refuse_unknown("budget", domains, budgets)
    shares: dict[str, int | None] = {name: token_count(value) for name, value in budgets.items()}
    others = [domain for domain in domains if domain not in budgets]
    if max_tokens is not None and max_tokens < SHORTEST * len(others):
        raise UsageError(
            f"{max_tokens} tokens are too few for {len(others)} traces: "
            f"raise --max-tokens to at least {SHORTEST * len(others)}"
        )
    for number, domain in enumerate(others):
        # The first traces get the tokens that do not divide.
        shares[domain] = None if max_tokens is None else (max_tokens + len(others) - 1 - number) // len(others)
    return {domain: shares[domain] for domain in domains}


def weights_of(domains: Sequence[str], weights: Mapping[str, str | float]) -> dict[str, float]:
    """Return what a token of each domain counts in decisions; nothing where all count the same.

    >>> weights_of(["code", "chat"], {"chat": "2"})
    {'code': 1.0, 'chat': 2.0}
    """
    _refuse_unknown("weight", domains, weights)
    found = dict.fromkeys(domains, 1.0)
    for name, value in weights.items():
        try:
            found[name] = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
        except ValueError:
            found[name] = math.nan
        if not 0 <= found[name] < math.inf:
            raise UsageError(f"--weight {name}={value} is no weight: give a number from 0 on, such as 2 or 0.5")
    if not any(found.values()):
        raise UsageError("every --weight is 0, so that nothing would count; give one trace at least a larger one")
    return found if weights else {}


def _refuse_unknown(what: str, domains: Sequence[str], given: Mapping[str, object]) -> None:
    for name in given:
        if name not in domains:
            raise UsageError(f"a {what} is for {name!r}, but the traces are {', '.join(domains)}; name one of them")
