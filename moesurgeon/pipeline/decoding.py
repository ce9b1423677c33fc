"""What greedy decoding needs of a checkpoint: all its weights in memory, and what ends a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Source
from moesurgeon.engine.whole import filled
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.families.keys import count_of
from moesurgeon.pipeline.subject import Subject
from moesurgeon.surgery.anatomy import Anatomy


def ends_of(subject: Subject) -> list[int]:
    """Return the tokens that end a text, as stock ``generate`` takes them; none where nothing says so.

    They are in ``generation_config.json`` if there is one, else in ``config.json``, alone or as a list.
    """
    path = subject.root / "generation_config.json"
    config: Any = subject.checkpoint.config
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged; copy it from the original checkpoint, or remove it") from error
    named = config.get("eos_token_id") if isinstance(config, dict) else None
    ends = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(token) is int and token >= 0 for token in ends):
        raise CheckpointError(f"{subject.root}: eos_token_id is {str(named)[:40]!r}, no token; restore it")
    return ends


def refuse_spread(placement: Placement, what: str) -> None:
    """Raise UsageError where ``what`` would decode with a checkpoint that is divided among devices."""
    if placement.spread:
        raise UsageError(f"{what} decodes on one device, not with --device all; name one, such as --device cuda")


def decoding_bytes(anatomy: Anatomy, placement: Placement, *, rows: int, positions: int) -> int:
    """Return what decoding ``rows`` texts of up to ``positions`` tokens takes beside the weights.

    Keys and values of all layers, one layer's again while a token is added, and the logits of a position with what
    they are drawn by.
    """

    def count(key: str, default: int) -> int:
        return count_of(anatomy.config, key, default) or default

    heads = count("num_attention_heads", 1)
    wide = 2 * count("num_key_value_heads", heads) * count("head_dim", anatomy.hidden // heads)
    if latent := count("qk_nope_head_dim", 0):  # multi-head latent attention: expanded for all heads
        wide = heads * (latent + count("qk_rope_head_dim", 0) + count("v_head_dim", latent))
    cache = rows * positions * (anatomy.layers + 1) * wide * placement.dtype.itemsize
    return cache + rows * count("vocab_size", 0) * 6 * 4


@contextmanager
def whole(source: Source) -> Iterator[PreTrainedModel]:
    """Give the model of ``source`` with all its weights, and let go of them afterwards."""
    try:
        yield filled(source)
    finally:
        source.skeleton.clear(list(source.skeleton.targets))
