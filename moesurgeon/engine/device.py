"""Where the model runs and in which precision, resolved once from what the user asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesurgeon.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Placement:
    """A device and a dtype of the computation."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device} {str(self.dtype).removeprefix('torch.')}"


def place(device: str, dtype: str, stored: str | None) -> Placement:
    """Resolve ``device`` ("auto", "cpu", "cuda:0", ...) and ``dtype`` ("auto" or a name).

    Auto takes an accelerator if torch sees one; there the dtype is the one ``stored`` in the
    checkpoint, on a CPU float32, where it is as fast and routing does not flip on rounding.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    if dtype == "auto":
        return Placement(found, torch.float32 if found.type == "cpu" else DTYPES.get(stored or "", torch.bfloat16))
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of auto, {', '.join(DTYPES)}")
    return Placement(found, DTYPES[dtype])
