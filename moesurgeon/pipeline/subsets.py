"""What subsets of a checkpoint's experts cost by a profile's inner products: the best ones, and curves by count."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.errors import ProfileError
from moesurgeon.profiling.artefact import Profile
from moesurgeon.profiling.inner import Inner
from moesurgeon.profiling.removals import LayerErrors, rounded
from moesurgeon.profiling.statistics import Array
from moesurgeon.profiling.subset_errors import routing_at
from moesurgeon.progress import SILENT, Progress
from moesurgeon.selection.choose import best
from moesurgeon.selection.criteria import scores_of
from moesurgeon.selection.curves import curve_of
from moesurgeon.selection.search import search
from moesurgeon.selection.stability import Stability, changed_in
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.prune import Kept

_STARTS = ("reap", "traffic-reap", "ean", "gate", "frequency")
"""Criteria from whose choices the search starts too: what it finds costs a layer no more than any of them."""
_PER_EXPERT = 20
"""Sampled tokens for each expert, under which the inner products are called few."""
_COVERED = 0.98
"""Share of the tokens for which the error has to be known."""
Fixed = Mapping[int, Collection[int]]


@dataclass(frozen=True)
class Reconstruction:
    """The best subsets: ``kept`` by layer, ``evidence`` for them, ``warnings`` against, and how stable they are."""

    kept: Kept
    evidence: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    stability: Stability | None = None


def reconstruct(
    anatomy: Anatomy, profile: Profile, count: int, fixed: Fixed, progress: Progress = SILENT
) -> Reconstruction:
    """Return the ``count`` experts of every layer, ``fixed`` ones among them, that reproduce its output best.

    Raises ProfileError if ``profile`` has no inner products.
    """
    inner, statistics, groups = inner_of(profile), profile.weighted, anatomy.groups[0]
    weights = token_weights(profile, inner)
    kept: dict[int, tuple[int, ...]] = {}
    of_halves: list[dict[int, tuple[int, ...]]] = [{}, {}]
    layers: dict[str, Any] = {}
    others = [best(scores_of(statistics, name), statistics.layers, count, groups, fixed=fixed) for name in _STARTS]
    for layer in _shown(inner, "subsets", progress):
        errors = _Halves(anatomy, inner, layer, weights)
        stays, starts = fixed.get(layer, frozenset()), [other[layer] for other in others]
        found = search(errors, anatomy.experts, count, groups=groups, fixed=stays, starts=starts)
        kept[layer] = found.kept
        layers[str(layer)] = {
            "error": found.error,
            "reap": float(errors(_mask(anatomy, starts[0]))[0]),
            "compared": found.compared,
            "exact": found.exact,
            "covered": errors.covered(_mask(anatomy, found.kept)[0]),
        }
        for half, choice in zip(errors.halves, of_halves, strict=False):
            choice[layer] = search(half, anatomy.experts, count, groups=groups, fixed=stays, starts=[found.kept]).kept
    tokens = int(np.count_nonzero(weights))
    stability = changed_in(of_halves, kept, anatomy.experts) if all(of_halves) else None
    return Reconstruction(
        kept,
        {"reconstruction": {"tokens": tokens, "layers": layers}},
        [*few_tokens(tokens, anatomy.experts), *_uncovered(layers)] if count < anatomy.experts else [],
        stability,
    )


def curves(
    anatomy: Anatomy, profile: Profile, least: int, fixed: Fixed, progress: Progress = SILENT
) -> tuple[dict[str, Any], list[str]]:
    """Return by layer the points of error against count down to ``least`` experts, and what speaks against them.

    Raises ProfileError if ``profile`` has no inner products.
    """
    inner, groups = inner_of(profile), anatomy.groups[0]
    weights = token_weights(profile, inner)
    found: dict[str, Any] = {}
    covered: dict[str, int] = {}
    for layer in _shown(inner, "curves", progress):
        errors, stays = _Halves(anatomy, inner, layer, weights), fixed.get(layer, frozenset())
        points = curve_of(errors, anatomy.experts, least, groups=groups, fixed=stays)
        found[str(layer)] = points
        for point in points:
            share = errors.covered(_mask(anatomy, point["kept"])[0])
            if share < _COVERED:
                covered[str(layer)] = point["experts"]
                break
    warnings = few_tokens(int(np.count_nonzero(weights)), anatomy.experts)
    if covered:
        first = max(covered, key=covered.__getitem__)
        warnings.append(
            f"from {covered[first]} experts down (layer {first}) the curve counts over {1 - _COVERED:.0%} of the "
            "tokens as lost, whose experts were not run: profile with a larger --inner-experts"
        )
    return found, warnings


class _Halves:
    """The errors of a layer over all sampled tokens, and over those of either half of the documents, ``halves``.

    Of many subsets at once each half remembers its errors: a search that measures all needs that for three choices.
    ``halves`` is empty where all text is in one.
    """

    def __init__(self, anatomy: Anatomy, inner: Inner, layer: int, weights: Array) -> None:
        products, routing, parity = inner.layer(layer), routing_at(inner.rule, anatomy.top_k), inner.fold % 2
        parts = [np.where(parity == number, weights, 0.0) for number in (0, 1)]
        parts = [part for part in parts if part.any()]
        self._parts = [_Remembered(LayerErrors(products, routing, anatomy.top_k, part)) for part in parts]
        self._sizes = np.array([part @ products.output.astype(np.float64) for part in parts])
        self._tokens = np.array([part.sum() for part in parts])
        self.halves = self._parts if len(parts) == 2 else []

    def __call__(self, kept: NDArray[np.bool_]) -> Array:
        return self._together([part(kept) for part in self._parts])

    def without_each(self, kept: NDArray[np.bool_]) -> Array:
        return self._together([part.without_each(kept) for part in self._parts])

    def covered(self, kept: NDArray[np.bool_]) -> float:
        return float(self._tokens @ [part.errors.covered(kept) for part in self._parts] / self._tokens.sum())

    def _together(self, found: list[Array]) -> Array:
        return rounded(self._sizes @ np.array(found) / (self._sizes.sum() or 1.0))


class _Remembered:
    """``errors``, and what they were of the last subsets that were many."""

    def __init__(self, errors: LayerErrors) -> None:
        self.errors = errors
        self._asked, self._found = np.empty((0, 0), dtype=bool), np.empty(0)

    def __call__(self, kept: NDArray[np.bool_]) -> Array:
        if not np.array_equal(kept, self._asked):
            found = self.errors(kept)
            if len(kept) == 1:
                return found
            self._asked, self._found = kept, found
        return self._found

    def without_each(self, kept: NDArray[np.bool_]) -> Array:
        return self.errors.without_each(kept)


def inner_of(profile: Profile) -> Inner:
    if profile.inner is None:
        enough = max(1024, _PER_EXPERT * profile.statistics.experts)
        raise ProfileError(
            "the profile has no inner products, from which the error of a layer follows: make it again with "
            f"moesurgeon profile --inner {enough}"
        )
    return profile.inner


def token_weights(profile: Profile, inner: Inner) -> Array:
    """Return what each sampled token counts [N]: the weight of its domain."""
    by_domain = np.array([profile.origin.weights.get(name, 1.0) for name in profile.statistics.domains])
    weights: Array = by_domain[inner.domain]
    if not weights.any():
        raise ProfileError("no token of the profile's inner products has a weight; profile with other --weight")
    return weights


def _mask(anatomy: Anatomy, kept: Any) -> Any:
    return np.isin(np.arange(anatomy.experts), kept)[None]


def _shown(inner: Inner, what: str, progress: Progress) -> Iterator[int]:
    """Yield the layers under a bar."""
    with progress.task(what, len(inner.shape.layers), "layers") as advance:
        for layer in inner.shape.layers:
            yield layer
            advance(1)


def few_tokens(tokens: int, experts: int) -> list[str]:
    if tokens >= _PER_EXPERT * experts:
        return []
    return [
        f"errors of layers rest on {tokens} tokens, fewer than {_PER_EXPERT} for each of {experts} experts: "
        f"profile with --inner {_PER_EXPERT * experts} or more, on as much text"
    ]


def _uncovered(layers: Mapping[str, Any]) -> list[str]:
    worst = min(layers, key=lambda layer: layers[layer]["covered"])
    share = layers[worst]["covered"]
    if share >= _COVERED:
        return []
    return [
        f"for {1 - share:.0%} of the tokens of layer {worst} an expert that they would be given was not run; they "
        "were counted as lost: profile with a larger --inner-experts"
    ]
