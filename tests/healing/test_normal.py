"""Refits in the span of leading directions: against plain float64, and the full refit where that is all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moesurgeon.healing import exact
from moesurgeon.healing.block import error_of, own_values
from moesurgeon.healing.memory import refit_bytes
from moesurgeon.healing.normal import Chunks, leading_directions, ridge_solutions, sums_of
from moesurgeon.healing.ridge import refitted
from moesurgeon.pipeline.subject import open_subject
from tests.families.conftest import Stock
from tests.healing.cases import Stop, cut, stopped

WEIGHT = torch.zeros(12, 40)  # [H, F]


def _data(spread: torch.Tensor, tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is fed [N, F], with these singular values, and what is missing [N, H]."""
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    left, right = torch.linalg.qr(random(tokens, 40)).Q, torch.linalg.qr(random(40, 40)).Q
    return (left * spread) @ right.T, random(tokens, 12)


def _in_chunks(fed: torch.Tensor, missing: torch.Tensor) -> Chunks:
    def chunks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(fed.split(70), missing.split(70), strict=True)

    return chunks


def _ridge(fed: torch.Tensor, missing: torch.Tensor, strength: float) -> torch.Tensor:
    width = fed.shape[1]
    below = strength**0.5 * torch.eye(width, dtype=torch.float64)
    wanted = torch.cat([missing, torch.zeros(width, missing.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(torch.cat([fed, below]), wanted).solution.T


@pytest.mark.parametrize("rank", [40, 9, 1])
def test_a_refit_in_a_span_is_least_squares_there(rank: int) -> None:
    """With all directions that is the full refit."""
    fed, missing = _data(torch.logspace(0, -3, 40, dtype=torch.float64))
    chunks = _in_chunks(fed, missing)
    basis = leading_directions(chunks, WEIGHT, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-10, rtol=0)
    sums = sums_of(chunks, WEIGHT, basis)
    for share, found in zip((0.03, 1.0), ridge_solutions(sums, (0.03, 1.0)), strict=True):
        strength = share * float((fed * fed).sum(0).mean())
        expected = _ridge(fed if rank == 40 else fed @ basis, missing, strength)
        change = found @ basis.T
        torch.testing.assert_close(change if rank == 40 else found, expected, rtol=1e-7, atol=1e-9)
        error = (missing - fed @ change.T).square().sum()
        torch.testing.assert_close(sums.error(found), error, rtol=1e-9, atol=0)


def test_the_span_is_about_that_of_the_leading_singular_vectors() -> None:
    spread = torch.logspace(0, -3, 40, dtype=torch.float64)
    fed, missing = _data(spread)
    for rank in (4, 12, 30):
        basis = leading_directions(_in_chunks(fed, missing), WEIGHT, rank)
        left = float((fed - fed @ basis @ basis.T).square().sum())
        least = float(spread[rank:].square().sum())
        assert least <= left * (1 + 1e-9) and left <= 1.5 * least


def test_few_directions_are_found_in_full() -> None:
    """Any rank that spans what is fed gives the full refit; more of it changes nothing, nor does a lack of tokens."""
    spread = torch.zeros(40, dtype=torch.float64)
    spread[:5] = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])
    for fed, missing in (_data(spread), tuple(each[:5] for each in _data(torch.ones(40)))):
        expected = _ridge(fed, missing, 0.3 * float((fed * fed).sum(0).mean()))
        for rank in (5, 8, 20):
            basis = leading_directions(_in_chunks(fed, missing), WEIGHT, rank)
            (found,) = ridge_solutions(sums_of(_in_chunks(fed, missing), WEIGHT, basis), (0.3,))
            torch.testing.assert_close(found @ basis.T, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rank", [None, 9])
def test_float32_products_are_close(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: products of a chunk in float32, sums and solutions in float64."""
    chunks = _in_chunks(*_data(torch.logspace(0, -1, 40, dtype=torch.float64)))
    found = []
    for dtype in (torch.float64, torch.float32):
        monkeypatch.setattr(exact, "product_dtype", lambda _device, dtype=dtype: dtype)
        basis = leading_directions(chunks, WEIGHT, rank) if rank else None
        sums = sums_of(chunks, WEIGHT, basis)
        assert {tensor.dtype for tensor in (sums.gram, sums.moment, sums.square, sums.strength)} == {torch.float64}
        (change,) = ridge_solutions(sums, (0.1,))
        found.append(change if basis is None else change @ basis.T)
    assert not torch.equal(*found)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))


def _repeat_hidden_units(stop: Stop, rank: int) -> None:
    """Let each expert have no more than ``rank`` different hidden units."""
    experts: Any = stop.block.experts
    wide = experts.gate_up_proj.shape[1] // 2
    source = torch.arange(wide) % rank
    experts.gate_up_proj.data = experts.gate_up_proj.data[:, torch.cat([source, wide + source])]


def test_a_block_of_few_directions_is_refitted_in_full(stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject), which=1) as stop:
        _repeat_hidden_units(stop, 7)
        (full,) = refitted(stop.block, stop.train, stop.heldout).values()
        (low,) = refitted(stop.block, stop.train, stop.heldout, rank=7).values()
        own: Any = stop.block.experts.down_proj
        scale = float((full - own).abs().max())
        assert scale > 0
        torch.testing.assert_close(low, full, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "qwen2_moe"])
def test_more_directions_leave_less(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    with stopped(subject, cut(subject), which=1) as stop:
        own = own_values(stop.block)
        errors = [error_of(stop.block, own, stop.train)]
        for rank in (2, 8, None):
            found = refitted(stop.block, stop.train, stop.train, rank=rank)
            errors.append(error_of(stop.block, own | found, stop.train))
        assert errors == sorted(errors, reverse=True) and errors[0] > errors[1] > errors[3]
        beyond = refitted(stop.block, stop.train, stop.train, rank=10_000)
        full = refitted(stop.block, stop.train, stop.train)
        assert all(torch.equal(beyond[each], full[each]) for each in full)


def test_memory_grows_with_the_rank_not_with_the_square_of_the_width() -> None:
    full, half = (refit_bytes(4096, wide, None) for wide in (14336, 7168))
    assert full > 2.5 * half and full > 5 * 14336**2 * 8
    low = [refit_bytes(4096, 14336, rank) for rank in (256, 1024, 4096, 14336, 20000)]
    assert low == sorted(low) and low[1] < full / 3 and low[3] == low[4] == full
