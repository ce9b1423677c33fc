"""The normal equations of a linear map, in all of its dimensions or in the span of a few.

Full, the Gram matrix of an expert of width F is F x F in float64: 1.6 GB for Mixtral's 14336. With a rank r the map
is changed in the span of the r leading directions of what it is fed only: with an orthonormal Q [F, r] of them, k = h Q
and

    dW = R^T k (k^T k + lambda mean(diag(h^T h)) I)^-1 Q^T,

sums in r dimensions; the regularisation is that of the full problem, so that r = F gives its solution, and so does
any r that spans h. Q is found by the randomised range finder with power iterations (Halko, Martinsson, Tropp 2011,
algorithm 4.4): passes over the tokens, and F x r of memory.

Legend: n tokens of a chunk, F width of what the map is fed, H of what it gives, r dimensions (F, or the rank).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moesurgeon.healing.exact import add_product, exact_device, factor

PASSES = 2
"""Over the tokens for the leading directions: the span is that of (h^T h)^2 times a random matrix."""

Chunks = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]
"""What the map is fed [n, F], and what is missing [n, H] there; from the start each time."""


@dataclass(frozen=True)
class Sums:
    """Over tokens: ``gram`` k^T k [r, r], ``moment`` R^T k [H, r], ``square`` |R|^2, ``strength`` mean(diag(h^T h))."""

    gram: torch.Tensor
    moment: torch.Tensor
    square: torch.Tensor
    strength: torch.Tensor

    def error(self, change: torch.Tensor) -> torch.Tensor:
        """Return what is left of |R|^2 if the map changes by ``change`` [H, r], in terms of k."""
        return self.square - 2 * (change * self.moment).sum() + ((change @ self.gram) * change).sum()


def sums_of(chunks: Chunks, weight: torch.Tensor, basis: torch.Tensor | None = None) -> Sums:
    """Return the sums for the map ``weight`` [H, F]; ``basis``: Q [F, r], None for all dimensions."""
    high, wide = weight.shape
    size = wide if basis is None else basis.shape[1]
    gram, moment, square, trace = (_zeros(shape, weight) for shape in ((size, size), (high, size), (), ()))
    for fed, missing in chunks():
        hidden, short = factor(fed), factor(missing)
        square.add_(short.square().sum().to(square))
        if basis is not None:
            trace.add_(hidden.square().sum().to(trace))
            hidden = hidden @ basis.to(hidden)
        add_product(gram, hidden.T, hidden)
        add_product(moment, short.T, hidden)
    return Sums(gram, moment, square, gram.diagonal().mean() if basis is None else trace / wide)


def ridge_solutions(sums: Sums, lambdas: Sequence[float]) -> Iterator[torch.Tensor]:
    """Yield the change [H, r] for each of ``lambdas``; none where there are no activations."""
    for share in lambdas if sums.strength > 0 else ():
        regular = sums.gram.clone()
        regular.diagonal().add_(share * sums.strength)
        root, failed = torch.linalg.cholesky_ex(regular)
        del regular
        if not failed:
            yield torch.cholesky_solve(sums.moment.T, root).T


def leading_directions(chunks: Chunks, weight: torch.Tensor, rank: int) -> torch.Tensor:
    """Return an orthonormal basis [F, rank] of about the leading directions of what ``weight`` [H, F] is fed."""
    wide = weight.shape[1]
    basis = torch.randn(wide, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = basis.to(exact_device(weight.device))
    for _pass in range(PASSES):
        found = _zeros((wide, rank), weight)
        for fed, _missing in chunks():
            hidden = factor(fed)
            add_product(found, hidden.T, hidden @ basis.to(hidden))
        basis = torch.linalg.qr(found).Q
    return basis


def _zeros(shape: tuple[int, ...], weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=exact_device(weight.device))
