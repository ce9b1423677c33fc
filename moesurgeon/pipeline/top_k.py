"""What every number of experts per token costs each layer by inner products, and how a budget is best divided."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesurgeon.errors import ProfileError
from moesurgeon.pipeline.subsets import few_tokens, inner_of, token_weights
from moesurgeon.profiling.artefact import Profile
from moesurgeon.profiling.top_k_errors import errors_by_top_k
from moesurgeon.progress import SILENT, Progress
from moesurgeon.selection.top_k import divided, rather_more
from moesurgeon.surgery.anatomy import Anatomy


def by_layer(
    anatomy: Anatomy, profile: Profile, top_k: int, average: float | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Return ``per_layer``: by layer the ``errors`` at every top-k, ``scaled`` ones and the best ``scale`` for each.

    Beside it ``rather``, the layers that would rather keep more than ``top_k`` (``selection.top_k``); with an
    ``average`` ``divided``: how so many experts per token are best divided (``top_k`` by layer), the ``error`` of that,
    a mean over layers, and ``uniform``, that of every top-k which is the same in all layers; and ``warnings``. Raises
    ProfileError if ``profile`` has no inner products.
    """
    if profile.statistics.counts_only:
        raise ProfileError(
            "the profile holds a server's counts of tokens, from which no layer's error follows: profile the "
            "checkpoint itself, with --inner"
        )
    inner = inner_of(profile)
    weights = token_weights(profile, inner)
    found = {}
    with progress.task("errors by k", len(inner.shape.layers), "layers") as advance:
        for layer in inner.shape.layers:
            found[layer] = errors_by_top_k(inner.layer(layer), inner.rule, anatomy.top_k, weights)
            advance(1)
    report: dict[str, Any] = {
        "per_layer": {str(layer): each.as_dict() for layer, each in found.items()},
        "rather": rather_more({layer: float(each.errors[top_k - 1]) for layer, each in found.items()}),
        "warnings": few_tokens(int(np.count_nonzero(weights)), anatomy.experts),
    }
    if average is not None:
        errors_LK = np.array([each.errors for each in found.values()])
        counts = divided(errors_LK, average)
        report["divided"] = {
            "average": average,
            "top_k": {str(layer): count for layer, count in zip(found, counts, strict=True)},
            "error": float(np.mean([errors[count - 1] for errors, count in zip(errors_LK, counts, strict=True)])),
            "uniform": {str(k): float(error) for k, error in enumerate(errors_LK.mean(axis=0), start=1)},
        }
    return report
