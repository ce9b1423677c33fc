"""Why each expert goes: what the profile says of it, and, by its inner products, who is given its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.prune import Kept

if TYPE_CHECKING:
    from moesurgeon.profiling.artefact import Profile
    from moesurgeon.profiling.inner import Inner
    from moesurgeon.selection.explain import Moved

_AT_ONCE = 4096  # tokens


def explain_choice(
    anatomy: Anatomy, profile: Profile, kept: Kept, criterion: str, seed: int = 0, *, virtual: bool = False
) -> dict[str, Any]:
    """Return ``explained`` (see ``selection.explain``) and ``destinations``, what its ``goes_to`` rest on.

    ``virtual``: what goes is put out of reach by its bias, else removed. Needs torch for a profile with inner
    products only.
    """
    from moesurgeon.selection.criteria import CRITERIA, scores_of
    from moesurgeon.selection.explain import explained

    scores = scores_of(profile.weighted, criterion, seed) if criterion in CRITERIA else None
    moved: Moved | None = None
    basis: Mapping[str, Any] = {
        "from": None,
        "reason": "the profile has no inner products: profile with --inner to see who is given the tokens",
    }
    if profile.inner is not None:
        moved = _moved(anatomy, profile.inner, kept, virtual=virtual)
        basis = {"from": "inner", "tokens": profile.inner.shape.tokens}
    report = explained(profile.statistics, profile.weighted, kept, scores=scores, moved=moved)
    return {"explained": report, "destinations": dict(basis)}


def _moved(anatomy: Anatomy, inner: Inner, kept: Kept, *, virtual: bool) -> Moved:
    """Route the sampled tokens by the router's rule with and without the experts that go."""
    import numpy as np
    import torch

    from moesurgeon.profiling.subset_errors import routing_at
    from moesurgeon.selection.explain import moved_tokens

    result = {}
    for layer in inner.shape.layers:
        stored, top_k = inner.layer(layer), anatomy.top_ks[layer]
        routing = routing_at(inner.rule, top_k)
        mask_E = torch.full((anatomy.experts,), float("-inf"))
        mask_E[list(kept[layer])] = 0.0
        bias_E = None if stored.bias is None else torch.from_numpy(np.array(stored.bias))
        moved_EE = np.zeros((anatomy.experts, anatomy.experts))
        for first in range(0, len(stored.logits), _AT_ONCE):
            logits_TE = torch.from_numpy(np.array(stored.logits[first : first + _AT_ONCE]))
            # A bias out of reach leaves the scores as they are; without the expert softmax has other sums.
            fewer_TE = logits_TE if virtual and bias_E is not None else logits_TE + mask_E
            before_TK = routing.choose(routing.scores(logits_TE), bias_E, top_k)
            after_TK = routing.choose(routing.scores(fewer_TE), mask_E if bias_E is None else bias_E + mask_E, top_k)
            moved_EE += moved_tokens(before_TK.numpy(), after_TK.numpy(), anatomy.experts)
        result[layer] = moved_EE
    return result
