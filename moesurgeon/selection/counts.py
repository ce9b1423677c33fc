"""How many experts stay after each stage of a staged cut, as options say it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moesurgeon.errors import UsageError

_FORM = "give counts that stay, as 7,6, shares to remove, as 12.5%,25%, or one share in stages, as 25%:2"


def stage_counts(asked: str | Sequence[int], experts: int, groups: int = 1) -> tuple[int, ...]:
    """Return how many of ``experts`` stay after each stage; UsageError for what cannot be read or does not fall.

    Shares are of all experts and round down to what every routing group can lose.

    >>> stage_counts("25%:2", 8), stage_counts("7,6", 8), stage_counts("12.5%,50%", 16), stage_counts("25%:3", 16)
    ((7, 6), (7, 6), (14, 8), (15, 13, 12))
    """
    if not isinstance(asked, str):
        counts = list(asked)
    elif match := re.fullmatch(r"\s*([\d.]+)\s*%\s*:\s*(\d+)\s*", asked):
        counts = _in_stages(asked, _removed(asked, match[1], experts, groups), int(match[2]), experts, groups)
    else:
        counts = [_count(asked, item.strip(), experts, groups) for item in asked.split(",")]
    for before, after in zip([experts, *counts], counts, strict=False):
        if not 0 < after < before:
            raise UsageError(f"--stages {_shown(asked)}: {after} experts after {before} is no cut; {_FORM}")
    if not counts:
        raise UsageError(f"--stages {_shown(asked)} names no stage; {_FORM}")
    return tuple(counts)


def _in_stages(asked: str, removed: int, stages: int, experts: int, groups: int) -> list[int]:
    units = removed // groups
    if not 1 <= stages <= units:
        each = f" from each of {groups} groups" if groups > 1 else ""
        raise UsageError(
            f"--stages {asked} removes {units} experts{each}, which cannot be done in {stages} stages; "
            "name fewer stages, or at least one"
        )
    return [experts - groups * ((2 * units * stage + stages) // (2 * stages)) for stage in range(1, stages + 1)]


def _count(asked: str, item: str, experts: int, groups: int) -> int:
    if item.endswith("%"):
        return experts - _removed(asked, item[:-1], experts, groups)
    if not item.isdecimal():
        raise UsageError(f"--stages {asked}: {item!r} is no number of experts; {_FORM}")
    return int(item)


def _removed(asked: str, share: str, experts: int, groups: int) -> int:
    try:
        value = float(share) / 100
    except ValueError as error:
        raise UsageError(f"--stages {asked}: {share!r} is no share; {_FORM}") from error
    if not 0 < value < 1:
        raise UsageError(f"--stages {asked}: {share}% is not between 0 and 100 %; {_FORM}")
    removed = int(experts / groups * value + 1e-9) * groups
    if removed == 0:
        each = f" in each of {groups} groups" if groups > 1 else ""
        raise UsageError(f"--stages {asked}: {share}% of {experts} experts{each} is less than one")
    return removed


def _shown(asked: str | Sequence[int]) -> str:
    return asked if isinstance(asked, str) else ",".join(map(str, asked))


def possible_counts(experts: int, groups: int = 1) -> tuple[int, ...]:
    """Return the counts below ``experts`` that leave as many in every group, falling.

    >>> possible_counts(4), possible_counts(16, 4)
    ((3, 2, 1), (12, 8, 4))
    """
    return tuple(range(experts - groups, 0, -groups))
