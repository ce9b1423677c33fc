"""What the laws of the walk share: stock transformers to hold it against, and a walk to its logits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesurgeon.engine.batches import Batch, to_batch
from moesurgeon.engine.observe import Observation
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.families import FAMILIES
from moesurgeon.traces.windows import Window
from tests.families.factory import MODEL_TYPES

BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
RUNS = [name for name in MODEL_TYPES if BY_TYPE[name].not_run is None]
LAYOUTS = [
    name + kind for name in RUNS for kind in ("", " fused") if kind == "" or len(BY_TYPE[name].layouts) == 2
]  # fmt: skip

CPU = torch.device("cpu")


def text(*lengths: int, vocabulary: int = 128, seed: int = 0) -> Batch:
    """Return a batch of random windows of these lengths, padded on the right where they differ."""
    rng = np.random.default_rng([seed, *lengths])
    windows = [
        Window("text", number, 0, rng.integers(2, vocabulary, length).astype(np.int32))
        for number, length in enumerate(lengths)
    ]
    return to_batch(windows, CPU)


def load_stock(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    """Load ``folder`` with transformers alone.

    Of a file it maps tensors where they happen to begin, and kernels for aligned memory add up in another
    order than those for any: so that the last bit is the same, all get memory of their own. Nor may
    weights want a gradient: torch multiplies a batch by such a matrix in one piece, else row by row.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, **{"experts_implementation": "eager", **settings}
        )
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
    return logits


def walked(streams: Sequence[Stream], batches: Sequence[Batch], folder: Path | None = None) -> list[list[torch.Tensor]]:
    """Return, per stream and batch, the logits [B, T, V] at the end of a walk."""
    walk = Walk(streams, batches, folder)
    walk.through()
    found: list[list[torch.Tensor]] = []
    for tail in walk.tail():
        for stream in streams:
            found.append(
                [tail.logits(stream, number, 0, batch.tokens.shape[1]) for number, batch in enumerate(batches)]
            )
    return found


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether two lists of tensors are the same to the last bit."""
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def routed(stream: Stream, batches: Sequence[Batch]) -> tuple[list[torch.Tensor], dict[int, list[torch.Tensor]]]:
    """Return the logits of a walk and, by layer, the experts that each token of each batch was given."""
    chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in stream.anatomy.moe_layers}

    def note(_block: object, seen: Observation) -> None:
        chosen[seen.layer].append(seen.indices)

    walk = Walk([stream], batches)
    walk.through(lambda _stream, _batch: note)
    logits = [tail.logits(stream, number, 0, 17) for tail in walk.tail() for number in range(len(batches))]
    return logits, chosen
