"""What is left of a block's error after the survivors of a cut were refitted, for one subset of experts after another.

It is the refit of ``healing.ridge`` on a sample, in float32, with what does not depend on the subset computed once: of
an expert the hidden activations on every token of the sample, of the shared experts the normal matrix and its
factors. Only the routing is the subset's own, by the family's rule with the logits of the others at -inf: what the cut
checkpoint will do, to the last bit but for ties.

Legend: N sampled tokens, E experts, k experts per token, H hidden, F expert width, n tokens that one expert is given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moesurgeon.engine.model import MoeBlock, shared_experts
from moesurgeon.engine.routing import Routing, selection_bias
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.healing.ridge import LAMBDAS
from moesurgeon.healing.sample import Sample

SWEEPS = 2
CACHE = 512 << 20
"""Bytes of activations that are kept of a layer, and of factors of a trial; if more, they are computed when needed."""


def cache_bytes(at_once: int = BATCH_TOKENS) -> int:
    """Return what may be kept where so many tokens are computed at once: less where memory is little."""
    return CACHE * at_once // BATCH_TOKENS


_Fed = tuple[torch.Tensor | None, torch.Tensor]
"""The tokens (None: all) that a map is given, and what it is fed there [n, F]."""


@dataclass(frozen=True)
class Left:
    """Squared errors of a subset on held-out tokens, as shares of |z|^2, each token with its weight in the sample: of
    the cut alone, and after the refit."""

    bare: float
    healed: float


@dataclass(frozen=True)
class _Normal:
    """Of what one linear map is fed: the normal matrices [F, F] over training and held-out tokens; ``roots``, the
    Cholesky factors of the first for each lambda, where they are kept."""

    train: torch.Tensor
    held: torch.Tensor
    roots: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, fed: Sequence[torch.Tensor], lambdas: Sequence[float], *, keep: bool) -> _Normal:
        train, held = (each.T @ each for each in fed)
        normal = cls(train, held)
        return cls(train, held, tuple(normal.factors(lambdas))) if keep else normal

    def factors(self, lambdas: Sequence[float]) -> Iterator[torch.Tensor]:
        if self.roots:
            yield from self.roots
            return
        strength = self.train.diagonal().mean()
        for factor in lambdas if strength > 0 else ():
            regular = self.train.clone()
            regular.diagonal().add_(factor * strength)
            root, failed = torch.linalg.cholesky_ex(regular)
            if not failed:
                yield root


class Trials:
    """Tries subsets of one layer's experts; ``train`` is what they are refitted on, ``held`` what judges.

    ``routing``: the family's rule with the checkpoint's top-k, which is ``top_k``.
    """

    @torch.no_grad()
    def __init__(
        self,
        block: MoeBlock,
        routing: Routing,
        top_k: int,
        train: Sample,
        held: Sample,
        *,
        lambdas: Sequence[float] = LAMBDAS,
        sweeps: int = SWEEPS,
        cache: int = CACHE,
    ) -> None:
        experts: Any = block.experts
        self._experts = experts
        self._routing, self._top_k, self._lambdas, self._sweeps = routing, top_k, lambdas, sweeps
        self._sets = (train, held)
        # All squares and products count by the tokens' weights: what a map is fed and what is missing are times these.
        self._roots = [each.weights.sqrt() for each in self._sets]
        self._bias = selection_bias(block)
        self._scale = 1 / held.square if held.square else float("nan")
        count, self._wide = experts.down_proj.shape[0], experts.down_proj.shape[-1]
        self._cache = cache
        self._hidden = (
            [[self._activations(each, expert) for expert in range(count)] for each in self._sets]
            if activation_bytes(count, self._wide, len(train) + len(held)) <= cache
            else None
        )
        self._shared: tuple[list[torch.Tensor], _Normal] | None = None
        if (shared := shared_experts(block)) is not None:
            fed = [
                _shared_activations(block, shared[1], each.inputs) * root[:, None]
                for each, root in zip(self._sets, self._roots, strict=True)
            ]
            self._shared = fed, _Normal.of(fed, lambdas, keep=normal_bytes(1, fed[0].shape[1], lambdas) <= cache)

    @torch.no_grad()
    def __call__(self, kept: Collection[int]) -> Left:
        """Return what keeping only the experts ``kept`` leaves."""
        routed = [self._routed(each, root, kept) for each, root in zip(self._sets, self._roots, strict=True)]
        missing = [each.wanted * root[:, None] for each, root in zip(self._sets, self._roots, strict=True)]
        for expert in sorted(kept):
            weight = self._experts.down_proj[expert].float()
            for number, given in enumerate(routed):
                rows, fed = self._fed(number, expert, given)
                missing[number].index_add_(0, rows, fed @ weight.T, alpha=-1.0)
        bare = self._error(missing[1])
        normals: dict[int, _Normal] = {}
        keep = normal_bytes(len(kept), self._wide, self._lambdas) <= self._cache
        for _sweep in range(self._sweeps):
            for expert in sorted(kept):
                parts = [self._fed(number, expert, given) for number, given in enumerate(routed)]
                if all(len(rows) for rows, _fed in parts):
                    normal = normals.get(expert) or _Normal.of([fed for _, fed in parts], self._lambdas, keep=keep)
                    if keep:
                        normals[expert] = normal
                    self._improve(missing, parts, normal)
            if self._shared:
                shared, normal = self._shared
                self._improve(missing, [(None, each) for each in shared], normal)
        return Left(bare, self._error(missing[1]))

    def _error(self, missing: torch.Tensor) -> float:
        return float(missing.square().sum(dtype=torch.float64)) * self._scale

    def _routed(
        self, sample: Sample, root: torch.Tensor, kept: Collection[int]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return by expert the tokens that it is given, and its weights there times ``root`` [n]."""
        mask = torch.full_like(sample.logits[0], -torch.inf)
        mask[sorted(kept)] = 0
        scores = self._routing.scores(sample.logits + mask)
        bias = mask if self._bias is None else self._bias.float() + mask
        chosen = self._routing.choose(scores, bias, self._top_k)
        weights = self._routing.weights(scores, chosen).flatten()
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(mask)).tolist()
        tokens = order // self._top_k
        weights = weights[order] * root[tokens]
        return dict(enumerate(zip(tokens.split(counts), weights.split(counts), strict=True)))

    def _fed(
        self, number: int, expert: int, given: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens that ``expert`` is given, and what its down projection is fed there [n, F]."""
        rows, weights = given[expert]
        if self._hidden is not None:
            hidden = self._hidden[number][expert].index_select(0, rows)
        else:
            hidden = self._activations(self._sets[number], expert, rows)
        return rows, hidden.mul_(weights[:, None])

    def _activations(self, sample: Sample, expert: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        inputs = sample.inputs if rows is None else sample.inputs.index_select(0, rows)
        gate, up = F.linear(inputs, self._experts.gate_up_proj[expert]).chunk(2, dim=-1)
        result: torch.Tensor = self._experts.act_fn(gate) * up
        return result.float()

    def _improve(self, missing: list[torch.Tensor], parts: Sequence[_Fed], normal: _Normal) -> None:
        """Take what a map can bring off ``missing`` (training, held-out), if any lambda helps on held-out tokens."""
        moments = [
            hidden.T @ (whole if rows is None else whole.index_select(0, rows))
            for whole, (rows, hidden) in zip(missing, parts, strict=True)
        ]  # [F, H]
        best, change = 0.0, None
        for root in normal.factors(self._lambdas):
            candidate = torch.cholesky_solve(moments[0], root)
            gain = float(((normal.held @ candidate - 2 * moments[1]) * candidate).sum())
            if gain < best:
                best, change = gain, candidate
        if change is None:
            return
        for whole, (rows, hidden) in zip(missing, parts, strict=True):
            if rows is None:
                whole.addmm_(hidden, change, alpha=-1.0)
            else:
                whole.index_add_(0, rows, hidden @ change, alpha=-1.0)


def activation_bytes(experts: int, wide: int, tokens: int) -> int:
    """Return what the activations of all experts on all tokens take."""
    return experts * wide * tokens * 4


def normal_bytes(experts: int, wide: int, lambdas: Sequence[float] = LAMBDAS) -> int:
    """Return what the normal matrices of so many experts and their factors take."""
    return experts * (2 + len(lambdas)) * wide**2 * 4


def _shared_activations(block: MoeBlock, shared: Any, inputs: torch.Tensor) -> torch.Tensor:
    gate = getattr(block.module, "shared_expert_gate", None)  # Qwen2-MoE weighs its shared expert by a sigmoid
    hidden: torch.Tensor = shared.act_fn(shared.gate_proj(inputs)) * shared.up_proj(inputs)
    return (hidden if gate is None else hidden * gate(inputs).sigmoid()).float()
