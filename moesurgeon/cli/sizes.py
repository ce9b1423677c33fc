"""Sizes as people write them."""

from __future__ import annotations

import re

from moesurgeon.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def bytes_of(text: str | None) -> int | None:
    """Return the number of bytes that ``text`` means; None stays None. Raises UsageError for anything else.

    Units are powers of 1000 (kB, MB, GB, TB) or of 1024 (KiB, MiB, GiB, TiB), in any case.

    >>> bytes_of("5GB"), bytes_of("1.5 KiB"), bytes_of("300")
    (5000000000, 1536, 300)
    """
    if text is None:
        return None
    from decimal import Decimal  # 0.29 * 100 is 28.99... in floats; imported here: most runs need neither

    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)", text.strip(), flags=re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(
            f"{text[:40]!r} is no size: write a number with B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, as 5GB"
        )
    size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise UsageError(f"{text[:40]!r} is less than a byte; give a larger size, as 5GB")
    return size
