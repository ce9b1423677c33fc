"""In which precision products and sums are taken, by device: no float64 on some, slow on most that are not a CPU."""

from __future__ import annotations

import torch


def exact_device(device: torch.device) -> torch.device:
    """Return where float64 sums of what is on ``device`` are held and solved: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which activations of a chunk are multiplied; the products are added up in float64.

    On an accelerator float32: float64 is there at 1/2 (data centre) to 1/64 (all others) of its rate, and a chunk of
    4096 products loses 1e-6 of a sum at most.
    """
    return torch.float64 if device.type == "cpu" else torch.float32


def factor(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` as a factor of products where it is."""
    return tensor.to(product_dtype(tensor.device))


def add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """Add ``one`` @ ``other`` to the float64 ``total``."""
    if one.dtype == total.dtype and one.device == total.device:
        total.addmm_(one, other)
    else:
        total.add_((one @ other).to(total.device))


def sum_of_squares(tensor: torch.Tensor) -> float:
    """Return |tensor|^2, in float64 where the device has it."""
    squares = tensor.float().square()
    return float(squares.sum() if tensor.device.type == "mps" else squares.sum(dtype=torch.float64))
