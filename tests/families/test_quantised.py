"""Quantised experts move with their scales, and still dequantise to the same weights in stock transformers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from moesurgeon.pipeline.subject import open_subject
from moesurgeon.runtime.cost import count_parameters
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.prune import plan_prune
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, save_tensors
from tests.families.running import load_stock, logits_of
from tests.families.second_opinion import kept_of, pruned, same
from tests.families.variants import quantised


@pytest.mark.parametrize("name", ["minimax_m2", "glm4_moe", "deepseek_v4"])
def test_scales_go_with_their_experts(stock: Stock, tmp_path: Path, name: str) -> None:
    quantised(stock(name), tmp_path / "fp8")
    if name == "deepseek_v4":  # its own spelling
        tensors = load_tensors(tmp_path / "fp8")
        renamed = {key.replace(".weight_scale_inv", ".scale"): value for key, value in tensors.items()}
        save_tensors(tmp_path / "fp8", config_of(tmp_path / "fp8"), renamed)
    source = open_subject(str(tmp_path / "fp8"))
    assert count_parameters(source.anatomy) == count_parameters(open_subject(str(stock(name))).anatomy)
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, tmp_path / "pruned")
    same(load_tensors(tmp_path / "pruned"), pruned(load_tensors(source.root), kept_of(source)))


def _gpt_oss(plain: Path, target: Path) -> Path:
    """Save GPT-OSS as it is published: MXFP4, gate and up as rows, 32 weights to a block, biases beside them."""
    tensors, generator = load_tensors(plain), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, ins, outs = tensors.pop(name).shape
        for suffix, shape, low, high in (("blocks", (ins // 32, 16), 0, 256), ("scales", (ins // 32,), 120, 126)):
            stored = torch.randint(low, high, (experts, outs, *shape), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_{suffix}"] = stored
    config = {**config_of(plain), "quantization_config": {"quant_method": "mxfp4"}}
    return save_tensors(target, config, tensors)


def test_blocks_and_scales_of_gpt_oss_go_with_their_experts(stock: Stock, tmp_path: Path) -> None:
    source = open_subject(str(_gpt_oss(stock("gpt_oss"), tmp_path / "mxfp4")))
    tensors = load_tensors(source.root)
    assert count_parameters(source.anatomy) == count_parameters(open_subject(str(stock("gpt_oss"))).anatomy)
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, tmp_path / "pruned")
    same(load_tensors(tmp_path / "pruned"), pruned(tensors, kept_of(source)))


def test_deepseek_v4_as_it_is_published(stock: Stock, tmp_path: Path) -> None:
    """Experts of four bits, two to a byte, with a power of two for 32 of them; the extra layer's as well."""
    tensors, generator = load_tensors(stock("deepseek_v4 mtp")), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors.pop(name).shape
        packed = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=generator)
        scale = torch.randint(120, 126, (rows, columns // 32), dtype=torch.uint8, generator=generator)
        tensors |= {name: packed, name.removesuffix("weight") + "scale": scale.view(torch.float8_e8m0fnu)}
    source = open_subject(str(save_tensors(tmp_path / "fp4", config_of(stock("deepseek_v4 mtp")), tensors)))
    assert count_parameters(source.anatomy) == count_parameters(open_subject(str(stock("deepseek_v4 mtp"))).anatomy)
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, tmp_path / "pruned")
    same(load_tensors(tmp_path / "pruned"), pruned(tensors, kept_of(source)))


def _dequantised(folder: Path, how: Any) -> PreTrainedModel:
    """Load ``folder`` in stock transformers without any quantised kernel; every tensor must have its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, quantization_config=how
        )
    assert not any(info.values()), info
    return model.eval()


# With the block size of the fixture; the releases' 128 is wider than its matrices.
FP8 = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))


@pytest.mark.parametrize(
    "name",
    ["mixtral", "deepseek_v3", "deepseek_v4", "qwen3_moe", "glm4_moe", "minimax_m2", "ernie4_5_moe", "gpt_oss"],
)
def test_what_stays_dequantises_to_the_same_weights(stock: Stock, tmp_path: Path, name: str) -> None:
    """The law of pruning, behind stock's own dequantisation: a scale out of step would show in every weight."""
    fixture = _gpt_oss if name == "gpt_oss" else quantised
    how = Mxfp4Config(dequantize=True) if name == "gpt_oss" else FP8
    source = open_subject(str(fixture(stock(name), tmp_path / "quantised")))
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, tmp_path / "pruned")
    whole, cut = _dequantised(source.root, how), _dequantised(tmp_path / "pruned", how)
    same(cut.state_dict(), pruned(whole.state_dict(), kept_of(source)))
    assert logits_of(cut).isfinite().all()
    plain = load_stock(stock(name))
    layer = source.anatomy.moe_layers[-1]
    down = f"{source.anatomy.family.block_module.replace('{layer}', str(layer))}.experts.down_proj"
    assert not torch.equal(plain.state_dict()[down], whole.state_dict()[down]), "nothing was quantised"
