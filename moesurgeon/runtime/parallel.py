"""Expert parallelism: over how many ranks a number of experts can be split evenly."""

from __future__ import annotations

_SIZES = tuple(2**power for power in range(1, 9))  # ranks come in powers of two, up to DeepSeek-V3's 256


def ranks_of(experts: int) -> list[int]:
    """Return the numbers of ranks that ``experts`` can be split over evenly.

    >>> ranks_of(6)
    [1, 2, 3, 6]
    """
    return [ranks for ranks in range(1, experts + 1) if experts % ranks == 0]


def parallel_warnings(before: int, after: int) -> list[str]:
    """Say which powers of two split ``before`` experts evenly but not ``after``, and what would fit instead.

    vLLM, DeepSpeed and Megatron refuse or pad what does not split evenly.

    >>> parallel_warnings(8, 6)[0]
    '6 experts split evenly over 1, 2, 3 or 6 ranks, not over 4 (nearest: 4 or 8 experts) or 8 (nearest: 8 experts)'
    >>> parallel_warnings(8, 4)
    ['4 experts split evenly over 1, 2 or 4 ranks, not over 8 (nearest: 8 experts)']
    >>> parallel_warnings(6, 6)
    []
    """
    lost = [size for size in _SIZES if before % size == 0 and after % size]
    if not lost:
        return []
    cases = [f"{size} (nearest: {_either(_nearest(size, before, after))} experts)" for size in lost]
    return [f"{after} experts split evenly over {_either(ranks_of(after))} ranks, not over {_either(cases)}"]


def _nearest(size: int, before: int, after: int) -> list[int]:
    """Return the counts on both sides of ``after`` that ``size`` ranks can share, of those that exist."""
    return [count for count in (after // size * size, after // size * size + size) if 0 < count <= before]


def _either(things: list[int] | list[str]) -> str:
    *others, last = map(str, things)
    return f"{', '.join(others)} or {last}" if others else last
