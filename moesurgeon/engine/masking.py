"""Routers that cannot choose some of their experts: what a checkpoint without them would route.

The stock router runs as it is; only its logits are -inf where an expert is masked. A selection bias is
masked as well, since sigmoid(-inf) + bias is the bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from moesurgeon.engine.model import MoeBlock
from moesurgeon.errors import CheckpointError


class _MaskedLogits(TorchFunctionMode):
    """Adds ``mask`` [E] to what comes out of the one product of a router."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self._mask = mask
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return result
        self.products += 1
        return result + self._mask.to(result.device, result.dtype)


@contextmanager
def masked(block: MoeBlock, experts: frozenset[int], count: int) -> Iterator[None]:
    """Inside the context the router of ``block`` chooses among ``count`` experts without ``experts``."""
    mask = torch.zeros(count)
    mask[sorted(experts)] = -math.inf
    router: nn.Module = block.router
    stock = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _MaskedLogits(mask) as mode:
            result = stock(*args, **kwargs)
        if mode.products != 1:
            raise CheckpointError(f"{block.name}: experts of this kind of router cannot be masked")
        return result

    bias = None if block.bias_holder is None else getattr(block.bias_holder, block.bias_name, None)
    router.forward = forward
    try:
        if isinstance(bias, torch.Tensor):
            _set(block, bias.clone().index_fill_(-1, torch.tensor(sorted(experts), device=bias.device), -math.inf))
        yield
    finally:
        router.forward = stock
        if isinstance(bias, torch.Tensor):
            _set(block, bias)


def _set(block: MoeBlock, bias: torch.Tensor) -> None:
    holder = block.bias_holder
    assert holder is not None
    if block.bias_name in holder._parameters:
        holder._parameters[block.bias_name] = nn.Parameter(bias, requires_grad=False)
    else:
        setattr(holder, block.bias_name, bias)
