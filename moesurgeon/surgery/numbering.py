"""Which experts of the source the experts of a result are, through any number of prunes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def source_experts(record: Iterable[Mapping[str, Any]], layer: int, experts: int) -> tuple[int, ...]:
    """Return for each expert of the result, in order, its number in a source with ``experts`` per layer.

    ``record``: a plan's, or what a provenance file holds; operations with an ``expert_map`` renumber.

    >>> prunes = [{"expert_map": {"3": {"0": 0, "2": 1, "3": 2}}}, {"expert_map": {"3": {"1": 0, "2": 1}}}]
    >>> source_experts(prunes, 3, 4), source_experts(prunes, 5, 4)
    ((2, 3), (0, 1, 2, 3))
    """
    numbers = tuple(range(experts))
    for operation in record:
        places = operation.get("expert_map", {}).get(str(layer))
        if places is not None:
            by_place = {new: numbers[int(old)] for old, new in places.items()}
            numbers = tuple(by_place[place] for place in range(len(by_place)))
    return numbers


def new_numbers(
    record: Iterable[Mapping[str, Any]], layers: Iterable[int], experts: int
) -> dict[int, dict[int, int]] | None:
    """Return by layer which number the experts that are left of ``experts`` have; None where none were renumbered.

    >>> new_numbers([{"expert_map": {"3": {"0": 0, "2": 1}}}], [3], 4)
    {3: {0: 0, 2: 1}}
    """
    operations = list(record)
    if not any("expert_map" in operation for operation in operations):
        return None
    return {layer: {old: new for new, old in enumerate(source_experts(operations, layer, experts))} for layer in layers}
