"""Arithmetic on stored tensors that is exact, without a tensor library."""

from __future__ import annotations

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.surgery.edits import Pure


def doubled(spec: TensorSpec) -> Pure:
    """Return a function from the bytes of ``spec`` to those of the tensor times two.

    Doubling only moves the exponent, so it is exact short of overflow, which the function refuses.
    """
    if spec.dtype not in ("BF16", "F16", "F32"):
        raise UsageError(f"{spec.name} is stored as {spec.dtype} and cannot be doubled exactly; dequantise it first")

    def function(raw: bytes) -> bytes:
        import numpy as np

        stored = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[spec.dtype]
        values = np.frombuffer(raw, dtype=stored)
        if spec.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # no-numbers may be of the kind that signals
            twice = values * values.dtype.type(2)
        if not np.array_equal(np.isfinite(twice), np.isfinite(values)):
            raise CheckpointError(f"{spec.name} holds values too large to be doubled in {spec.dtype}")
        if spec.dtype == "BF16":
            twice = (twice.view(np.uint32) >> 16).astype(np.uint16)
        return bytes(twice.tobytes())

    return Pure(f"doubled {spec.dtype}", function)
