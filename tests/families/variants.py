"""What the hub has and stock transformers does not save: quantised experts, other names, layers behind the last."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.families.factory import config_of, load_tensors, save_tensors

# Which layer the one for multi-token prediction is like, and what it is called.
_MTP = {
    "deepseek_v4": ("layers.3.", "mtp.0."),
    "ernie4_5_moe": ("model.layers.2.", "model.mtp_block.0."),
}


def with_hub_names(folder: Path) -> Path:
    """Give a DeepSeek-V4 checkpoint the hub's names; transformers 5.23 writes ``model.`` in front of most."""
    tensors = {
        name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_"): tensor
        for name, tensor in load_tensors(folder).items()
    }
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    return save_tensors(folder, config_of(folder), tensors)


def quantised(folder: Path, target: Path, *, block: int = 16) -> Path:
    """Save ``folder`` again with its routed experts in FP8 and a scale per block, as DeepSeek-V3 is published."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(folder).items():
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        tensors[name] = tensor.to(torch.float8_e4m3fn)
        rows, columns = (-(-size // block) for size in tensor.shape)
        tensors[name.replace(".weight", ".weight_scale_inv")] = torch.rand(rows, columns)
    quantisation = {"quant_method": "fp8", "weight_block_size": [block, block]}
    return save_tensors(target, {**config_of(folder), "quantization_config": quantisation}, tensors)


def packed(folder: Path, target: Path) -> Path:
    """Save the fused checkpoint ``folder`` again with its experts in blocks and scales, as MXFP4 is stored."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(folder).items():
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        for suffix, shape in (("_blocks", (columns // 32, 16)), ("_scales", (columns // 32,))):
            stored = torch.randint(256, (experts, rows, *shape), dtype=torch.uint8, generator=generator)
            tensors[name + suffix] = stored
    return save_tensors(target, {**config_of(folder), "quantization_config": {"quant_method": "mxfp4"}}, tensors)


def with_mtp_layer(folder: Path, target: Path, *, dense: bool = False) -> Path:
    """Save ``folder`` again with a layer for multi-token prediction, named as the family's releases name it.

    ``dense``: like the last layer, which must have no experts then.
    """
    config, tensors = config_of(folder), load_tensors(folder)
    last = config["num_hidden_layers"] - 1
    like, prefix = _MTP.get(config["model_type"], (f"model.layers.{last}.", f"model.layers.{last + 1}."))
    like = f"model.layers.{last}." if dense else like
    wide, vocabulary = config["hidden_size"], config["vocab_size"]
    extra: dict[str, tuple[int, ...]]
    match config["model_type"]:
        case "deepseek_v4":
            extra = {
                **dict.fromkeys((f"{prefix}{norm}.weight" for norm in ("enorm", "hnorm", "norm")), (wide,)),
                **dict.fromkeys((f"{prefix}{matrix}.weight" for matrix in ("e_proj", "h_proj")), (wide, wide)),
                **{f"{prefix}{name}": tuple(tensors[name].shape) for name in tensors if name.startswith("hc_head_")},
                f"{prefix}head.weight": (vocabulary, wide),
            }
        case "ernie4_5_moe":
            extra = {
                "model.mtp_emb_norm.0.weight": (wide,),
                "model.mtp_hidden_norm.0.weight": (wide,),
                "model.mtp_linear_proj.0.weight": (wide, 2 * wide),
            }
        case _:
            extra = {
                **dict.fromkeys((f"{prefix}{norm}.weight" for norm in ("enorm", "hnorm", "shared_head.norm")), (wide,)),
                f"{prefix}eh_proj.weight": (wide, 2 * wide),
                f"{prefix}embed_tokens.weight": (vocabulary, wide),
                f"{prefix}shared_head.head.weight": (vocabulary, wide),
            }
    block = {name.replace(like, prefix): tuple(tensor.shape) for name, tensor in tensors.items() if like in name}
    generator = torch.Generator().manual_seed(0)
    layer = {name: torch.randn(shape, generator=generator) / 8 for name, shape in {**block, **extra}.items()}
    key = "num_mtp_modules" if config["model_type"] == "minimax_m2" else "num_nextn_predict_layers"
    save_tensors(target, {**config, key: 1}, tensors)
    (target / "model.safetensors").rename(target / "model-main.safetensors")
    save_file(layer, target / "model-mtp.safetensors", {"format": "pt"})
    places = dict.fromkeys(tensors, "model-main.safetensors") | dict.fromkeys(layer, "model-mtp.safetensors")
    size = sum(tensor.nbytes for tensor in [*tensors.values(), *layer.values()])
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target
