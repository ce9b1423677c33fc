"""Where the model runs and in which precision, resolved once from what the user asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesurgeon.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Placement:
    """A device and a dtype of the computation. ``spread``: over all devices of this kind, beginning there."""

    device: torch.device
    dtype: torch.dtype
    spread: bool = False

    def __str__(self) -> str:
        return f"{f'all {self.device.type}' if self.spread else self.device} {str(self.dtype).removeprefix('torch.')}"


def place(device: str, dtype: str, stored: str | None) -> Placement:
    """Resolve ``device`` ("auto", "all", "cpu", "cuda:0", ...) and ``dtype`` ("auto" or a name).

    All divides the layers among the accelerators. Auto takes an accelerator if torch sees one; there the
    dtype is the one ``stored`` in the checkpoint, on a CPU float32, where it is as fast and routing does not
    flip on rounding.
    """
    spread = device == "all"
    if device in ("auto", "all"):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None and spread:
            raise UsageError("--device all needs accelerators, and torch sees none here; use --device cpu")
        device = (f"{accelerator.type}:0" if spread else accelerator.type) if accelerator else "cpu"
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    if dtype == "auto":
        as_stored = DTYPES.get(stored or "", torch.bfloat16)
        return Placement(found, torch.float32 if found.type == "cpu" else as_stored, spread)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of auto, {', '.join(DTYPES)}")
    return Placement(found, DTYPES[dtype], spread)
