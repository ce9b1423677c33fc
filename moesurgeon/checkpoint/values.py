"""Values in stored bytes, as far as headers do not tell: numbers that are none, and small tensors as floats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesurgeon.checkpoint.header import StoredTensor
from moesurgeon.checkpoint.reader import ShardReader

if TYPE_CHECKING:  # imported where it is used: headers need none of it
    from numpy.typing import NDArray

# By dtype: what the bytes are viewed as, and the bits that are all set in NaN and infinity.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
    "F8_E5M2": ("u1", 0x1F << 2),
    "F8_E4M3": ("u1", 0x7F),  # has no infinity, and NaN alone has all bits set
    "F8_E8M0": ("u1", 0xFF),
}


def count_not_finite(dtype: str, raw: bytes) -> int:
    """Return how many values in ``raw`` are NaN or infinite; 0 for dtypes that have none.

    >>> import struct
    >>> count_not_finite("F32", struct.pack("<4f", 1.0, float("nan"), float("-inf"), 0.0))
    2
    """
    if dtype not in _EXPONENTS:
        return 0
    import numpy as np

    view, mask = _EXPONENTS[dtype]
    bits = np.frombuffer(raw, dtype=view)
    wanted = bits.dtype.type(mask)
    return int(((bits & wanted) == wanted).sum())


def floats_of(reader: ShardReader, tensor: StoredTensor) -> NDArray[Any] | None:
    """Return all values of a small ``tensor`` in float32 or more; None for dtypes that are not plain floats."""
    import numpy as np

    raw = reader.read(tensor)
    values: NDArray[Any]
    match tensor.dtype:
        case "BF16":
            values = (np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).view("<f4")
        case "F16" | "F32" | "F64":
            values = np.frombuffer(raw, dtype={"F16": "<f2", "F32": "<f4", "F64": "<f8"}[tensor.dtype])
        case _:
            return None
    exact = np.float64 if tensor.dtype == "F64" else np.float32
    return values.astype(exact).reshape(tensor.shape)
