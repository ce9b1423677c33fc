"""What a stock model hands to each of its layers besides the hidden states: masks, positions, rotary embeddings.

Every family prepares these in its own ``forward``. So that ours needs no knowledge of that, the stock
``forward`` is run with layers that only take down what they are called with, and is left before the last norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.scratch import MASK_BYTES
from moesurgeon.engine.skeleton import Skeleton

Call = tuple[tuple[Any, ...], dict[str, Any]]
_REMEMBERED = 64  # shapes; each holds rotary embeddings of its length


class _AllTakenDown(Exception):
    """Leaves the stock forward once its last layer was called."""


class Arguments:
    """Answers what the stock model would call its layers with, for the batches of one walk, known by identity.

    ``masks``: bytes of padded batches' masks that are kept from layer to layer.
    """

    def __init__(self, skeleton: Skeleton, masks: int = MASK_BYTES) -> None:
        self._skeleton = skeleton
        self._layers = [skeleton.layer(number) for number in range(skeleton.layers)]
        self._positions = [module for module in skeleton.base.modules() if hasattr(module, "max_seq_len_cached")]
        # Of batches without padding only the shape matters.
        self._by_shape: dict[tuple[int, ...], list[Call]] = {}
        # Of padded ones everything does; as many as there is room for.
        self._by_batch: dict[int, list[Call]] = {}
        self._room = masks

    def embedded(self, batch: Batch) -> torch.Tensor:
        """Return what the first layer is given [B, T, H]; the input embedding has to be filled."""
        states, _ = self._taken_down(batch, input_ids=batch.tokens)
        return states

    def of(self, batch: Batch, layer: int, like: torch.Tensor) -> Call:
        """Return what ``layer`` is called with behind the hidden states, which are ``like`` this."""
        return self._of_all(batch, like)[layer]

    def _of_all(self, batch: Batch, like: torch.Tensor) -> list[Call]:
        shape = tuple(like.shape)
        if batch.mask is None:
            if shape not in self._by_shape:
                if len(self._by_shape) >= _REMEMBERED:
                    self._by_shape.pop(next(iter(self._by_shape)))
                self._by_shape[shape] = self._taken_down(batch, inputs_embeds=torch.empty_like(like))[1]
            return self._by_shape[shape]
        if id(batch) in self._by_batch:
            return self._by_batch[id(batch)]
        calls = self._taken_down(batch, inputs_embeds=torch.empty_like(like))[1]
        size = 4 * shape[0] * shape[1] ** 2
        if size <= self._room:
            self._room -= size
            self._by_batch[id(batch)] = calls
        return calls

    @torch.no_grad()
    def _taken_down(self, batch: Batch, **inputs: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        calls: list[Call] = []
        first: list[torch.Tensor] = []
        # Dynamic rotary embeddings remember the longest text so far; a batch must not depend on those before it.
        for module in self._positions:
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, 0)
        with _listening(self._layers, first, calls), suppress(_AllTakenDown):
            self._skeleton.base(attention_mask=batch.mask, use_cache=False, **inputs)
        return first[0], calls


@contextmanager
def _listening(layers: list[nn.Module], first: list[torch.Tensor], calls: list[Call]) -> Iterator[None]:
    """Let ``layers`` append what they are called with to ``calls``, and pass on the hidden states."""

    def forward(hidden_states: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor:
        if not calls:
            first.append(hidden_states)
        calls.append((positional, named))
        if len(calls) == len(layers):
            raise _AllTakenDown
        return hidden_states

    own = [vars(layer).get("forward") for layer in layers]  # hooks of accelerate replace it as well
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
