import pytest
import torch

from moesurgeon.engine.device import DTYPES, Placement, place
from moesurgeon.errors import UsageError


def _with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch seem to have CUDA devices: names of devices work everywhere, only tensors do not."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch, "empty", lambda size, device: None)


def _without_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


def test_auto_without_an_accelerator_is_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_accelerator(monkeypatch)
    for stored in ("bfloat16", "float16", None, "float8_e4m3fn"):
        assert place("auto", "auto", stored) == Placement(torch.device("cpu"), torch.float32)
    assert str(place("auto", "auto", "bfloat16")) == "cpu float32"


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("float16", torch.float16), ("bfloat16", torch.bfloat16), (None, torch.bfloat16), ("int8", torch.bfloat16)],
)
def test_on_an_accelerator_auto_is_the_stored_dtype(
    stored: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_cuda(monkeypatch)
    assert place("cuda:1", "auto", stored) == Placement(torch.device("cuda:1"), dtype)
    assert place("auto", "auto", stored) == Placement(torch.device("cuda"), dtype)
    assert place("cpu", "auto", stored) == Placement(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_that_is_named_is_taken(name: str) -> None:
    assert place("cpu", name, "bfloat16").dtype == getattr(torch, name)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", ""])
def test_an_unknown_dtype_is_wrong_usage(dtype: str) -> None:
    with pytest.raises(UsageError, match="not one of auto, float32, bfloat16, float16"):
        place("cpu", dtype, None)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "cuda:77", "meta", ""])
def test_a_device_that_is_not_there_is_wrong_usage(device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device} cannot be used here: .+") as raised:
        place(device, "auto", None)
    assert "\n" not in str(raised.value)
