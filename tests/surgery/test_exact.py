"""Doubling stored numbers is exact: every number of 16 bits is tried, and many of 32."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.surgery.exact import doubled

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _doubled(values: torch.Tensor, dtype: str) -> torch.Tensor:
    raw = values.view(torch.uint8).numpy().tobytes()
    out = doubled(TensorSpec("w", dtype, tuple(values.shape)))(raw)
    assert len(out) == len(raw)
    return torch.frombuffer(bytearray(out), dtype=TORCH[dtype]) if out else torch.empty(0, dtype=TORCH[dtype])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_of_16_bits(dtype: str) -> None:
    """Subnormal ones, zeros of both signs, infinities and no-numbers included."""
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(TORCH[dtype])
    exact = every.double() * 2
    fits = (exact.abs() <= torch.finfo(TORCH[dtype]).max) | ~every.isfinite()
    # The largest exponent, of both signs.
    assert int((~fits).sum()) == 2 * {"BF16": 1 << 7, "F16": 1 << 10}[dtype]
    found = _doubled(every[fits], dtype).double()
    assert torch.equal(found.isnan(), every[fits].isnan())
    numbers = ~found.isnan()
    assert torch.equal(found[numbers], exact[fits][numbers])
    assert torch.equal(found[numbers].signbit(), exact[fits][numbers].signbit())
    for value in every[~fits][:: 1 << 5]:
        with pytest.raises(CheckpointError, match=f"w holds values too large to be doubled in {dtype}"):
            _doubled(value.reshape(1), dtype)


FINITE = st.floats(width=32, allow_nan=False, max_value=2.0**126, min_value=-(2.0**126))


@given(st.lists(FINITE, max_size=50))
def test_numbers_of_32_bits(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    assert torch.equal(_doubled(values, "F32").double(), values.double() * 2)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_one_number_that_is_too_large_is_enough(dtype: str) -> None:
    values = torch.zeros(100, dtype=TORCH[dtype])
    values[57] = torch.finfo(TORCH[dtype]).max
    with pytest.raises(CheckpointError, match="too large to be doubled"):
        _doubled(values, dtype)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I32", "F64"])
def test_other_dtypes_are_refused_when_the_plan_is_made(dtype: str) -> None:
    with pytest.raises(UsageError, match=f"w is stored as {dtype} and cannot be doubled exactly"):
        doubled(TensorSpec("w", dtype, (1,)))
