"""How much text of each domain there is, as it is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def amounts(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how much text of each domain there is.

    >>> amounts({"code": {"documents": 1, "tokens": 1200}, "chat": {"documents": 41, "tokens": 49152}})
    'code 1 document, 1,200 tokens; chat 41 documents, 49,152 tokens'
    """
    return "; ".join(
        f"{domain} {each['documents']:,} document{'' if each['documents'] == 1 else 's'}, {each['tokens']:,} tokens"
        for domain, each in facts.items()
    )
