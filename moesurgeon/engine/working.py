"""What computing takes beside weights and hidden states: known from shapes, before anything is read.

Legend: T tokens of a batch, H hidden, F expert width, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.streams import Source
from moesurgeon.families.keys import count_of

NO_LOGITS, ALONE, COMPARED = 0, 12, 28
"""Bytes of each logit at work: none, logits and their log-softmax, and both models' with what compares them
(float32; sums over the vocabulary are taken in float64)."""
_FLOAT = 4
_STAGED = 16 << 20  # read at once where a stored dtype is cast


def layer_bytes(source: Source, batches: Sequence[Batch]) -> int:
    """Return what the batch that takes most needs in the layer that takes most.

    The phases of a layer are a norm in float32, attention (or a dense layer), the mixture. Of each linear map there is
    its output and a copy of it. Each expert works on its own tokens, which may be all of them: gate and up, activation,
    product, output and the output weighted; ``grouped_mm`` works on those of all experts at once.
    """
    anatomy, size = source.anatomy, source.placement.dtype.itemsize
    hidden = anatomy.hidden
    outside, inside = _outputs(source)
    attention = (2 * outside + 2 * hidden) * size + _state_bytes(source)
    at_once = 1 if _is_eager(source, "_experts_implementation") else anatomy.top_k
    experts = at_once * (4 * anatomy.expert_width + 2 * hidden)
    mixture = (2 * inside + 2 * hidden + experts) * size + 4 * _FLOAT * anatomy.experts
    each = 2 * hidden * size + max(3 * _FLOAT * hidden, attention, mixture)
    # Of every pair of tokens: the mask of a padded batch, and scores where they are not computed piece by piece.
    heads = count_of(anatomy.config, "num_attention_heads", 1) if _is_eager(source, "_attn_implementation") else 0
    scores, mask = heads * (2 * _FLOAT + size), _FLOAT + size
    shapes = {(*batch.tokens.shape, batch.mask is not None) for batch in batches}
    return max(
        (rows * length * (each + length * (scores + mask * padded)) for rows, length, padded in shapes), default=0
    )


def logit_bytes(source: Source, positions: int, each: int) -> int:
    """Return the bytes that the head needs for ``positions``, with ``each`` bytes per logit."""
    vocabulary, hidden = count_of(source.anatomy.config, "vocab_size", 0), source.anatomy.hidden
    return positions * (vocabulary * each + 3 * hidden * _FLOAT) if each else 0


def loading_bytes(source: Source) -> int:
    """Return what reading takes beside the place that a tensor goes to: a piece of it that is cast, or FP8 weights and
    their scales in float32."""
    stored = source.anatomy.tensors
    most = 0
    for piece in (piece for pieces in source.destinations.pieces.values() for piece in pieces):
        size = stored[piece.source].nbytes
        most = max(most, min(_STAGED, size) if piece.scale is None else size * (1 + 2 * _FLOAT))
    return most


def _is_eager(source: Source, which: str) -> bool:
    return getattr(source.skeleton.model.config, which, None) == "eager"


def _outputs(source: Source) -> tuple[int, int]:
    """Return how many outputs a token has of a layer's linear maps: outside a mixture, and inside beside experts."""
    skeleton, family = source.skeleton, source.anatomy.family
    outside = inside = 0
    for layer in range(source.layers):
        block = family.block_module.replace("{layer}", str(layer)) + "."
        is_moe = layer in source.anatomy.moe_layers
        found = {True: 0, False: 0}
        for name in skeleton.names_of_layer(layer):
            shape = skeleton.targets[name].shape
            if len(shape) == 2:
                found[is_moe and name.startswith(block)] += shape[0]
        outside, inside = max(outside, found[False]), max(inside, found[True])
    return outside, inside


def _state_bytes(source: Source) -> int:
    """Return what the scan of a state space model takes of a token: its states and what goes into them."""
    most = 0
    for layer in range(source.layers):
        for module in source.skeleton.layer(layer).modules():
            each: Any = module
            state, wide = getattr(each, "ssm_state_size", 0), getattr(each, "intermediate_size", 0)
            if isinstance(state, int) and isinstance(wide, int):
                most = max(most, state * wide)
    return 4 * _FLOAT * most
