"""What greedy decoding needs of a checkpoint: all its weights in memory, and what ends a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from moesurgeon.engine.streams import Source
from moesurgeon.engine.whole import filled
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.pipeline.subject import Subject


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


def require_resident(source: Source, what: str) -> None:
    """Raise UsageError where ``what`` would decode with a checkpoint that is not in the memory of one device."""
    if source.placement.spread:
        raise UsageError(f"{what} decodes on one device, not with --device all; name one, such as --device cuda")
    if not source.supply.plan.is_resident:
        raise UsageError(
            f"{what} needs the checkpoint in memory: with less, every new token would be a read of all its layers; "
            "raise --max-memory, use a smaller --dtype, or leave it out"
        )


@contextmanager
def whole(source: Source) -> Iterator[PreTrainedModel]:
    """Give the model of ``source`` with all its weights, and let go of them afterwards."""
    try:
        yield filled(source)
    finally:
        source.skeleton.clear(list(source.skeleton.targets))
