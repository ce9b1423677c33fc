"""FP8 with scales by blocks walks as the same values stored plainly, and as transformers dequantises them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import FineGrainedFP8Config

from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.prune import plan_prune
from tests.engine.small import source_of, stream_of
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, save_checkpoint, save_tensors
from tests.laws.walks import CPU, load_stock, logits_of, same, text, walked

BATCHES = [text(24, 17, 9), text(20, 20)]
FAMILIES = ["deepseek_v3", "qwen3_moe", "mixtral"]


def _quantised(folder: Path, target: Path, block: int) -> Path:
    """Save ``folder`` again with its experts in FP8, and scales that leave the values about as large as they were."""
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(folder).items():
        tensors[name] = tensor
        if ".experts." in name:
            grid = [-(-size // block) for size in tensor.shape]
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = 0.75 + 0.5 * torch.rand(grid, generator=random)
    quantisation = {"quant_method": "fp8", "weight_block_size": [block, block]}
    return save_tensors(target, {**config_of(folder), "quantization_config": quantisation}, tensors)


def _dequantised(folder: Path, target: Path, block: int, dtype: torch.dtype = torch.float32) -> Path:
    """Save the values of the FP8 checkpoint ``folder``, each multiplied by the scale of its block, one by one."""
    tensors = load_tensors(folder)
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None:
            rows, columns = (torch.arange(size) // block for size in tensor.shape)
            tensor = tensor.float() * scale[rows][:, columns]
            tensor = tensor.to(dtype)
        plain[name] = tensor
    config = {key: value for key, value in config_of(folder).items() if key != "quantization_config"}
    return save_tensors(target, config, plain)


def _resident_and_streamed(subject: Subject, dtype: torch.dtype = torch.float32) -> list[Stream]:
    one, other = (source_of(subject, Placement(CPU, dtype)) for _ in range(2))
    other.supply.allow(other.supply.least)
    return [Stream(one), Stream(other)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [16, 24, 128])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_same_values_stored_plainly(
    name: str, block: int, dtype: torch.dtype, stock: Stock, tmp_path: Path
) -> None:
    """Also with blocks that stand out at the edge, or are larger than the matrix."""
    folder = _quantised(stock(name), tmp_path / "fp8", block)
    plain = stream_of(open_subject(str(_dequantised(folder, tmp_path / "plain", block, dtype))), Placement(CPU, dtype))
    expected = walked([plain], BATCHES)[0]
    assert all(logits.isfinite().all() for logits in expected)
    for stream in _resident_and_streamed(open_subject(str(folder)), dtype):
        assert same(walked([stream], BATCHES)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_what_transformers_dequantises(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = _quantised(save_checkpoint(tmp_path / "plain", name, dtype=dtype), tmp_path / "fp8", 16)
    model = load_stock(folder, dtype, quantization_config=FineGrainedFP8Config(dequantize=True))
    expected = [logits_of(model, batch) for batch in BATCHES]
    for stream in _resident_and_streamed(open_subject(str(folder)), dtype):
        assert same(walked([stream], BATCHES)[0], expected)


def test_a_pruned_one_walks_as_what_is_written(stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(_quantised(stock("mixtral"), tmp_path / "fp8", 16)))
    plan = plan_prune(subject.anatomy, dict.fromkeys(range(4), (0, 2, 5, 6)))
    apply(plan, subject.checkpoint, tmp_path / "pruned")
    expected = walked([stream_of(open_subject(str(tmp_path / "pruned")))], BATCHES)[0]
    assert same(walked([Stream(source_of(subject), Overlay(plan=plan))], BATCHES)[0], expected)


def _broken(subject: Path, target: Path, suffix: str, tensor: torch.Tensor | None) -> Subject:
    """Replace or remove the first tensor that ends in ``suffix``."""
    tensors = load_tensors(subject)
    first = min(name for name in tensors if name.endswith(suffix))
    del tensors[first]
    if tensor is not None:
        tensors[first] = tensor
    return open_subject(str(save_tensors(target, config_of(subject), tensors)), complete=False)


def test_scales_that_do_not_fit_are_refused(stock: Stock, tmp_path: Path) -> None:
    folder = _quantised(stock("mixtral"), tmp_path / "fp8", 16)
    other = _broken(folder, tmp_path / "other", "_scale_inv", torch.ones(3, 3))
    with pytest.raises(CheckpointError, match=r"_scale_inv has shape \[3, 3\], blocks of 16 x 16 make it"):
        walked([stream_of(other)], BATCHES)
    without = _broken(folder, tmp_path / "without", "_scale_inv", None)
    with pytest.raises(CheckpointError, match=r"without .*_scale_inv; dequantise the checkpoint"):
        stream_of(without)
