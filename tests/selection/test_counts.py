from __future__ import annotations

import pytest

from moesurgeon.errors import UsageError
from moesurgeon.selection.counts import possible_counts, stage_counts


@pytest.mark.parametrize(
    ("asked", "experts", "groups", "expected"),
    [
        ("25%:2", 8, 1, (7, 6)),
        ("25%:1", 8, 1, (6,)),
        ("50 % : 3", 16, 1, (13, 11, 8)),
        ("25%:4", 64, 4, (60, 56, 52, 48)),
        ("25%", 64, 8, (48,)),
        ("30%", 16, 4, (12,)),  # of each group one, though 30 % are four and more
        ("12.5%,25%,50%", 8, 1, (7, 6, 4)),
        ("7, 6", 8, 1, (7, 6)),
        ((14, 12), 16, 1, (14, 12)),
    ],
)
def test_counts(asked: str, experts: int, groups: int, expected: tuple[int, ...]) -> None:
    assert stage_counts(asked, experts, groups) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("", "'' is no number of experts"),
        ("six", "'six' is no number"),
        ("6,7", "7 experts after 6 is no cut"),
        ("8", "8 experts after 8 is no cut"),
        ("7,7", "7 experts after 7"),
        ("0", "0 experts after 8"),
        ("25%:3", "removes 2 experts, which cannot be done in 3 stages"),
        ("25%:0", "cannot be done in 0 stages"),
        ("5%", r"5% of 8 experts is less than one"),
        ("0%", "0% is not between"),
        ("100%", "100% is not between"),
        ("1.2.3%", "'1.2.3' is no share"),
        ("-25%:2", "'-25%:2' is no number of experts"),
    ],
)
def test_what_cannot_be_read_is_refused(asked: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stage_counts(asked, 8)


def test_no_stage_is_refused() -> None:
    with pytest.raises(UsageError, match="names no stage"):
        stage_counts((), 8)


def test_groups_are_named() -> None:
    with pytest.raises(UsageError, match=r"removes 1 experts from each of 4 groups"):
        stage_counts("25%:2", 16, 4)
    assert possible_counts(16, 4) == (12, 8, 4)
