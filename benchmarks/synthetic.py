"""A checkpoint of any size without a model: Mixtral's names and config, bytes that mean nothing.

    python benchmarks/synthetic.py --bytes 4GB [--layout per-expert|fused|fp8] [--shard-bytes 500MB] OUT

Everything that reads headers and moves bytes takes it for a real one. The numbers are finite and small,
no two MiB are the same, and the same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.header import TensorSpec, build_header
from moesurgeon.checkpoint.open import CONFIG_NAME, INDEX_NAME

FAMILIES = ("mixtral",)
LAYOUTS = ("per-expert", "fused", "fp8")
_STEP = 1 << 20
_SCALED = 128  # rows and columns that share one FP8 scale


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of a synthetic Mixtral; ``vocabulary`` x ``hidden`` is stored twice."""

    hidden: int = 1024
    width: int = 3584
    experts: int = 8
    vocabulary: int = 32000


def geometry_for(nbytes: int) -> Geometry:
    """Return sizes that make a checkpoint of ``nbytes`` of several layers."""
    if nbytes >= 1_000_000_000:
        return Geometry()
    if nbytes >= 100_000_000:
        return Geometry(hidden=512, width=1792, vocabulary=8000)
    return Geometry(hidden=64, width=224, vocabulary=256)


def make_checkpoint(
    folder: Path,
    nbytes: int,
    *,
    layout: str = "per-expert",
    shard_bytes: int = 500_000_000,
    geometry: Geometry | None = None,
) -> Path:
    """Write a Mixtral checkpoint of ``nbytes`` or up to a layer more to the new folder ``folder``."""
    geometry = geometry or geometry_for(nbytes)
    ends, layer_bytes = sum(spec.nbytes for spec in _ends(geometry)), sum(s.nbytes for s in _layer(geometry, layout, 0))
    layers = max(1, -(-(nbytes - ends) // layer_bytes))
    tensors = [*_ends(geometry), *(spec for layer in range(layers) for spec in _layer(geometry, layout, layer))]
    shards = _sharded(tensors, shard_bytes)
    folder.mkdir(parents=True)
    weight_map = {}
    content = _endless()
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.sort(key=lambda spec: (spec.dtype != "F32", spec.dtype != "BF16", spec.name))  # as the library does
        with (folder / name).open("wb", buffering=0) as file:
            file.write(build_header(shard, {"format": "pt"}))
            left = sum(spec.nbytes for spec in shard)
            while left:
                left -= os.write(file.fileno(), next(content)[: min(left, _STEP)])
        weight_map |= {spec.name: name for spec in shard}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in tensors)}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    (folder / CONFIG_NAME).write_text(json.dumps(_config(geometry, layout, layers), indent=2))
    return folder


def bytes_from(text: str) -> int:
    """Return the bytes that a size in powers of 1000 means.

    >>> bytes_from("4GB"), bytes_from("300 MB")
    (4000000000, 300000000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 4GB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _ends(geometry: Geometry) -> list[TensorSpec]:
    return [
        TensorSpec("model.embed_tokens.weight", "BF16", (geometry.vocabulary, geometry.hidden)),
        TensorSpec("model.norm.weight", "BF16", (geometry.hidden,)),
        TensorSpec("lm_head.weight", "BF16", (geometry.vocabulary, geometry.hidden)),
    ]


def _layer(geometry: Geometry, layout: str, layer: int) -> list[TensorSpec]:
    prefix, high = f"model.layers.{layer}.", geometry.hidden
    block = prefix + ("mlp." if layout == "fused" else "block_sparse_moe.")
    return [
        TensorSpec(f"{prefix}input_layernorm.weight", "BF16", (high,)),
        TensorSpec(f"{prefix}post_attention_layernorm.weight", "BF16", (high,)),
        TensorSpec(f"{prefix}self_attn.q_proj.weight", "BF16", (high, high)),
        TensorSpec(f"{prefix}self_attn.k_proj.weight", "BF16", (high // 4, high)),
        TensorSpec(f"{prefix}self_attn.v_proj.weight", "BF16", (high // 4, high)),
        TensorSpec(f"{prefix}self_attn.o_proj.weight", "BF16", (high, high)),
        TensorSpec(f"{block}gate.weight", "BF16", (geometry.experts, high)),
        *_experts(geometry, layout, f"{block}experts."),
    ]


def _experts(geometry: Geometry, layout: str, prefix: str) -> Iterator[TensorSpec]:
    count, wide, high = geometry.experts, geometry.width, geometry.hidden
    if layout == "fused":
        yield TensorSpec(f"{prefix}gate_up_proj", "BF16", (count, 2 * wide, high))
        yield TensorSpec(f"{prefix}down_proj", "BF16", (count, high, wide))
        return
    for expert in range(count):
        for projection, shape in (("w1", (wide, high)), ("w2", (high, wide)), ("w3", (wide, high))):
            name = f"{prefix}{expert}.{projection}.weight"
            if layout == "fp8":
                scales = tuple(-(-size // _SCALED) for size in shape)
                yield TensorSpec(name, "F8_E4M3", shape)
                yield TensorSpec(f"{name}_scale_inv", "F32", scales)
            else:
                yield TensorSpec(name, "BF16", shape)


def _config(geometry: Geometry, layout: str, layers: int) -> dict[str, Any]:
    config = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": geometry.hidden,
        "initializer_range": 0.02,
        "intermediate_size": geometry.width,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "num_local_experts": geometry.experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": geometry.vocabulary,
    }
    if layout == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [_SCALED, _SCALED],
        }
    return config


def _sharded(tensors: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def _endless() -> Iterator[memoryview]:
    """Yield pieces of 1 MiB, each another window on 1 MiB of noise: no call for random bytes per piece."""
    noise = bytearray(random.Random(0).randbytes(_STEP))
    # As BF16 and F32: +-0.002 to 0.03; as F8_E4M3: no NaN.
    noise[0::2] = bytes(low & 0xBF for low in noise[0::2])
    noise[1::2] = bytes(0x3B | high & 0x80 for high in noise[1::2])
    twice = memoryview(bytes(noise) * 2)
    for number in range(_STEP):  # an odd factor: all 2^19 windows at even bytes come before one comes again
        start = 2 * (number * 0x9E3779B1 % (_STEP // 2))
        yield twice[start : start + _STEP]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="mixtral")
    parser.add_argument("--bytes", type=bytes_from, default="4GB")
    parser.add_argument("--layout", choices=LAYOUTS, default="per-expert")
    parser.add_argument("--shard-bytes", type=bytes_from, default="500MB")
    arguments = parser.parse_args()
    make_checkpoint(arguments.out, arguments.bytes, layout=arguments.layout, shard_bytes=arguments.shard_bytes)
    print(arguments.out)


if __name__ == "__main__":
    main()
