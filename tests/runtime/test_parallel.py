"""Over how many ranks experts split evenly."""

import pytest

from moesurgeon.runtime.parallel import parallel_warnings, ranks_of


def test_ranks() -> None:
    assert ranks_of(6) == [1, 2, 3, 6]
    assert ranks_of(64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (8, 6, ["over 1, 2, 3 or 6 ranks, not over 4 (nearest: 4 or 8 experts) or 8 (nearest: 8 experts)"]),
        (64, 48, ["not over 32 (nearest: 32 or 64 experts) or 64 (nearest: 64 experts)"]),
        (8, 4, ["over 1, 2 or 4 ranks, not over 8 (nearest: 8 experts)"]),
        (8, 7, ["over 1 or 7 ranks, not over 2 (nearest: 6 or 8 experts), 4 (nearest: 4 or 8 experts) or 8"]),
        (8, 1, ["over 1 ranks, not over 2 (nearest: 2 experts), 4"]),
        (8, 8, []),
        (6, 3, ["not over 2 (nearest: 2 or 4 experts)"]),
        (9, 3, []),
    ],
)
def test_warnings_name_the_nearest_counts(before: int, after: int, says: list[str]) -> None:
    warnings = parallel_warnings(before, after)
    assert len(warnings) == len(says)
    assert all(part in warning for part, warning in zip(says, warnings, strict=True))
