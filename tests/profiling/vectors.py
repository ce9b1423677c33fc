"""A layer whose experts' outputs are given as vectors: inner products of them, and what a subset costs the plain way.

Legend: N tokens, E experts, H hidden, m experts that were run for a token, k experts that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesurgeon.engine.routing import Routing
from moesurgeon.profiling.inner import InnerLayer

RULES = {
    "softmax": Routing("softmax", False, 1.0, 1, 1, "max"),
    "renormalised": Routing("softmax", True, 1.0, 1, 1, "max"),
    "epsilon": Routing("softmax", True, 1.5, 1, 1, "max", 0.05),
    "sigmoid": Routing("sigmoid", True, 2.5, 1, 1, "max", 1e-20),
    "sigmoid, raw": Routing("sigmoid", False, 1.0, 1, 1, "max"),
    "groups": Routing("softmax", False, 2.0, 4, 2, "max"),
    "groups, sums": Routing("sigmoid", True, 2.5, 4, 2, "top2-sum", 1e-20),
    "two groups": Routing("sigmoid", False, 1.0, 2, 1, "top2-sum"),
    "all groups": Routing("softmax", True, 1.0, 2, 2, "max"),
}


@dataclass(frozen=True)
class Layer:
    """``outputs`` [N, E, H], ``logits`` [N, E], ``bias`` [E] or None, routed by ``routing`` to ``top_k``."""

    outputs: np.ndarray
    logits: np.ndarray
    bias: np.ndarray | None
    routing: Routing
    top_k: int

    @classmethod
    def random(
        cls, seed: int, rule: str, *, tokens: int = 20, experts: int = 8, top_k: int = 2, bias: bool = False
    ) -> Layer:
        random = np.random.default_rng(seed)
        scale = random.uniform(0.3, 2.0, (1, experts, 1))
        # Outputs of experts resemble each other.
        outputs = scale * (random.standard_normal((tokens, experts, 6)) + random.standard_normal((tokens, 1, 6)))
        logits = (random.standard_normal((tokens, experts)) + random.standard_normal(experts)).astype(np.float32)
        biases = random.uniform(-0.3, 0.3, experts).astype(np.float32) if bias else None
        return cls(outputs, logits, biases, RULES[rule], top_k)

    def route(self, token: int, kept: Sequence[int]) -> dict[int, float]:
        """Return the experts of ``kept`` that a token is given, with their weights: from the definition."""
        rule, logits = self.routing, self.logits[token].astype(np.float64)
        if rule.scoring == "softmax":
            values = {e: np.exp(logits[e] - max(logits[list(kept)])) for e in kept}
            scores = {e: value / sum(values.values()) for e, value in values.items()}
        else:
            scores = {e: 1 / (1 + np.exp(-logits[e])) for e in kept}
        ranked = {e: scores[e] + (0.0 if self.bias is None else float(self.bias[e])) for e in kept}
        size, count = len(logits) // rule.groups, 1 if rule.group_score == "max" else 2
        groups = [sorted((ranked[e] for e in kept if e // size == g), reverse=True) for g in range(rule.groups)]
        sums = [sum(best[:count]) if len(best) >= count else -np.inf for best in groups]
        winners = sorted(range(rule.groups), key=lambda g: -sums[g])[: rule.kept_groups]
        inside = [e for e in kept if rule.groups == 1 or e // size in winners]
        chosen = sorted(inside, key=lambda e: -ranked[e])[: self.top_k]
        total = sum(scores[e] for e in chosen) + rule.epsilon if rule.renormalises else 1.0
        return {e: scores[e] / total * rule.scale for e in chosen}

    def output(self, token: int, kept: Sequence[int]) -> np.ndarray:
        """Return what the block gives [H] when only ``kept`` are there."""
        return sum(weight * self.outputs[token, e] for e, weight in self.route(token, kept).items())  # type: ignore[return-value]

    @property
    def everyone(self) -> range:
        return range(self.logits.shape[1])

    @cached_property
    def whole(self) -> np.ndarray:
        """What the block gives [N, H] with all of its experts."""
        return np.stack([self.output(token, self.everyone) for token in range(len(self.logits))])

    def error(self, kept: Sequence[int], weights: np.ndarray | None = None, run: np.ndarray | None = None) -> float:
        """Return what keeping ``kept`` costs, as a share of |y|^2: all of it where an expert was not ``run``."""
        weights = np.ones(len(self.logits)) if weights is None else weights
        errors = sizes = 0.0
        for token, weight in enumerate(weights):
            y = self.whole[token]
            lost = run is not None and not set(self.route(token, kept)) <= set(run[token].tolist())
            errors += weight * float(np.square(y if lost else y - self.output(token, kept)).sum())
            sizes += weight * float(np.square(y).sum())
        return errors / sizes

    def inner(self, run: np.ndarray | None = None) -> InnerLayer:
        """Return the inner products, of the experts ``run`` [N, m] where not of all."""
        y = self.whole
        f = self.outputs if run is None else np.take_along_axis(self.outputs, run[:, :, None], axis=1)
        return InnerLayer(
            np.einsum("nih,njh->nij", f, f).astype(np.float32),
            np.einsum("nih,nh->ni", f, y).astype(np.float32),
            np.square(y).sum(-1).astype(np.float32),
            self.logits,
            None if run is None else run.astype(np.int16),
            self.bias,
        )
