"""What pruning makes of a checkpoint, by indexing with torch and plain loops instead of byte ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moesurgeon.pipeline.subject import Subject
from tests.families.factory import ROUTERS

# Of 8 experts in two groups (0-3 and 4-7) as many of each, another choice in every layer; 4 is the layer for
# multi-token prediction.
KEPT = {0: (0, 2, 5, 6), 1: (0, 2, 5, 6), 2: (1, 2, 4, 7), 3: (0, 3, 4, 5), 4: (2, 3, 6, 7)}


def kept_of(subject: Subject) -> dict[int, tuple[int, ...]]:
    """Return ``KEPT`` for the layers of ``subject`` that have experts."""
    return {layer: KEPT[layer] for layer in subject.anatomy.routed_layers}


def pruned(tensors: Mapping[str, torch.Tensor], all_kept: Mapping[int, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return what pruning makes of ``tensors``."""
    result = {}
    for name, tensor in tensors.items():
        layer = re.search(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.", name)
        number = int(layer[1]) if layer else 4 if re.search(r"(?:^|\.)mtp(_block)?\.0\.", name) else -1
        kept = list(all_kept.get(number, ()))
        one = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
        if not kept or "shared" in name:
            result[name] = tensor
        elif one:
            if int(one[2]) in kept:
                result[f"{one[1]}{kept.index(int(one[2]))}{one[3]}"] = tensor
        elif ".experts.mlp." in name:  # flat
            result[name] = tensor.unflatten(0, (8, -1))[kept].flatten(0, 1)
        elif name.endswith("tid2eid"):
            result[name] = torch.tensor(table_by_loop(tensor.tolist(), kept), dtype=tensor.dtype)
        elif ".experts." in name or "put_linear" in name or ROUTERS.search(name):
            result[name] = tensor[:, kept] if tensor.shape[0] == 1 else tensor[kept]
        else:
            result[name] = tensor
    return result


def table_by_loop(table: Sequence[Sequence[int]], kept: Sequence[int]) -> list[list[int]]:
    """Return a table from tokens to experts without the others: those with the fewest entries take over.

    The rule is that of ``surgery.tables``, in the words of a beginner; numbers are the old ones until the end.
    """
    rows = [list(row) for row in table]
    loads = {expert: sum(row.count(expert) for row in rows) for expert in kept}
    for column in range(len(rows[0])):
        tokens = [row for row in rows if row[column] not in kept]
        promised = dict(loads)
        refused = []
        for row in tokens:
            offer = min(kept, key=lambda expert: (promised[expert], expert))
            promised[offer] += 1
            if offer in row:
                refused.append(row)
            else:
                row[column] = offer
                loads[offer] += 1
        for row in refused:
            best = min((expert for expert in kept if expert not in row), key=lambda expert: (loads[expert], expert))
            row[column] = best
            loads[best] += 1
    return [[list(kept).index(entry) for entry in row] for row in rows]


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Assert that both hold the same tensors, to the last bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``config`` with dotted keys, in its order."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
