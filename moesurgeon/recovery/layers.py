"""Around the layers of a model under training: what comes out of them, and computing them twice to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moesurgeon.surgery.anatomy import Anatomy


def layers_of(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """Return the decoder layers, first one first."""
    return [
        model.get_submodule(anatomy.family.layer.replace("{layer}", str(number))) for number in range(anatomy.layers)
    ]


@contextmanager
def recomputed(model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
    """Inside the context a layer keeps only its input for the backward pass, in which it runs again.

    Costs a second forward pass and saves the activations of all layers but the one at work. Not through
    transformers' own way, which needs the model in training mode, with its dropout and router noise.
    """
    layers: list[Any] = layers_of(model, anatomy)
    originals = [layer.forward for layer in layers]
    for layer, original in zip(layers, originals, strict=True):
        layer.forward = _twice(original)
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.forward = original


@contextmanager
def outputs(model: nn.Module, anatomy: Anatomy) -> Iterator[list[torch.Tensor]]:
    """Inside the context a list is filled with the hidden states [B, T, H] after each layer; who reads it clears it."""
    found: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers_of(model, anatomy)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _twice(forward: Any) -> Any:
    def again(*positional: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*positional, **named)
        return checkpoint(forward, *positional, use_reentrant=False, preserve_rng_state=False, **named)

    return again
