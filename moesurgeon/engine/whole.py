"""A checkpoint as one running model with all its weights in memory, for what trains or decodes."""

from __future__ import annotations

from transformers import PreTrainedModel

from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Source
from moesurgeon.surgery.anatomy import Anatomy


def load_model(
    checkpoint: Checkpoint, anatomy: Anatomy, placement: Placement, *, experts: str | None = None
) -> PreTrainedModel:
    """Load the whole model, ready for inference. ``experts``: how they are computed (``engine.skeleton``).

    Raises CheckpointError if a tensor is missing, unexpected (layers for multi-token prediction apart)
    or does not fit; a model never runs with weights that are not the checkpoint's. Also for a family
    whose blocks moesurgeon cannot follow.
    """
    with Source.of_checkpoint(checkpoint, anatomy, placement, experts) as source:
        return filled(source)


def filled(source: Source) -> PreTrainedModel:
    """Return the model of ``source`` with all its weights; they are those that its walks go through."""
    for _group, tensors in source.supply.walk():
        for name, tensor in tensors.items():
            source.skeleton.put(name, tensor)
    return source.skeleton.model
