"""What the number of tensors costs: DeepSeek-V3's 91,000 in 163 shards, each of them tiny.

    python benchmarks/many_tensors.py [--runs 3] [--layers 61] [--folder /tmp] [--keep]

Names, dtypes and config are those of DeepSeek-V3 in FP8 (58 mixture layers and one for multi-token
prediction, 256 experts, block scales); the matrices are small, so that no time goes into their bytes. Prints
wall time and peak memory of whole processes, that of a bare interpreter first, and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # as `python benchmarks/many_tensors.py`

from benchmarks.rewrite import MIB, Figures, Way, measure, show, tool
from moesurgeon.checkpoint.header import TensorSpec, build_header
from moesurgeon.checkpoint.open import CONFIG_NAME, INDEX_NAME

HIDDEN, WIDE, EXPERTS, KEPT, GROUPS, DENSE, SHARDS = 64, 32, 256, 192, 8, 3, 163


def make_deepseek(folder: Path, layers: int) -> Path:
    """Write ``layers`` layers and one for multi-token prediction to the new folder ``folder``."""
    tensors = [_spec("model.embed_tokens.weight", 128, HIDDEN), _spec("model.norm.weight", HIDDEN)]
    tensors.append(_spec("lm_head.weight", 128, HIDDEN))
    for layer in range(layers + 1):
        tensors += _layer(f"model.layers.{layer}.", is_dense=layer < DENSE)
    tensors += [_spec(f"model.layers.{layers}.{name}", *shape) for name, shape in _MTP.items()]
    folder.mkdir(parents=True)
    places = {}
    size = -(-len(tensors) // SHARDS)
    for number, start in enumerate(range(0, len(tensors), size), start=1):
        name = f"model-{number:05d}-of-{-(-len(tensors) // size):06d}.safetensors"
        some = sorted(tensors[start : start + size], key=lambda spec: (spec.dtype != "F32", spec.dtype, spec.name))
        (folder / name).write_bytes(build_header(some, {"format": "pt"}) + bytes(sum(spec.nbytes for spec in some)))
        places |= {spec.name: name for spec in some}
    metadata = {"total_size": sum(spec.nbytes for spec in tensors)}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": metadata, "weight_map": places}, indent=2))
    (folder / CONFIG_NAME).write_text(json.dumps(_CONFIG | {"num_hidden_layers": layers}, indent=2))
    return folder


_MTP = {
    "eh_proj.weight": (HIDDEN, 2 * HIDDEN), "enorm.weight": (HIDDEN,), "hnorm.weight": (HIDDEN,),
    "embed_tokens.weight": (128, HIDDEN), "shared_head.norm.weight": (HIDDEN,),
    "shared_head.head.weight": (128, HIDDEN),
}  # fmt: skip
_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": DENSE,
    "hidden_size": HIDDEN, "intermediate_size": 2 * WIDE, "moe_intermediate_size": WIDE, "n_routed_experts": EXPERTS,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": GROUPS, "topk_group": 4, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "vocab_size": 128, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def _spec(name: str, *shape: int, dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def _layer(prefix: str, *, is_dense: bool) -> Iterator[TensorSpec]:
    for name, size in (
        ("input_", HIDDEN),
        ("post_attention_", HIDDEN),
        ("self_attn.q_a_", 32),
        ("self_attn.kv_a_", 32),
    ):
        yield _spec(f"{prefix}{name}layernorm.weight", size)
    for name, shape in (
        ("q_a_proj", (32, HIDDEN)), ("q_b_proj", (128, 32)), ("kv_a_proj_with_mqa", (48, HIDDEN)),
        ("kv_b_proj", (128, 32)), ("o_proj", (HIDDEN, 64)),
    ):  # fmt: skip
        yield from _scaled(f"{prefix}self_attn.{name}", *shape)
    if is_dense:
        yield from _expert(f"{prefix}mlp.", 2 * WIDE)
        return
    yield _spec(f"{prefix}mlp.gate.weight", EXPERTS, HIDDEN)
    yield _spec(f"{prefix}mlp.gate.e_score_correction_bias", EXPERTS, dtype="F32")
    yield from _expert(f"{prefix}mlp.shared_experts.", WIDE)
    for expert in range(EXPERTS):
        yield from _expert(f"{prefix}mlp.experts.{expert}.", WIDE)


def _expert(prefix: str, wide: int) -> Iterator[TensorSpec]:
    yield from _scaled(f"{prefix}gate_proj", wide, HIDDEN)
    yield from _scaled(f"{prefix}up_proj", wide, HIDDEN)
    yield from _scaled(f"{prefix}down_proj", HIDDEN, wide)


def _scaled(name: str, *shape: int) -> Iterator[TensorSpec]:
    yield _spec(f"{name}.weight", *shape, dtype="F8_E4M3")
    yield _spec(f"{name}.weight_scale_inv", *(-(-size // 128) for size in shape), dtype="F32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--keep", action="store_true", help="leave the working folder")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="moesurgeon-tensors-", dir=arguments.folder))
    try:
        figures = of_commands(make_deepseek(scratch / "source", arguments.layers), scratch, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(scratch)
    show(figures)
    bare = max(figures["python"].resident)
    for name, of in figures.items():
        print(f"{name:<46} {(max(of.resident) - bare) / MIB:6.0f} MiB above python")
    print(json.dumps({"layers": arguments.layers, "figures": {name: of.as_dict() for name, of in figures.items()}}))


def of_commands(source: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Figures]:
    """Measure each command, in turns; what one writes the next ones read."""
    out, pruned, kept = scratch / "out", scratch / "pruned", scratch / "kept.json"
    size = EXPERTS // GROUPS
    stay = [expert for expert in range(EXPERTS) if expert % size < size * KEPT // EXPERTS]
    kept.write_text(json.dumps({str(layer): stay for layer in range(DENSE, arguments.layers)}))
    prune = ["prune", source, pruned, "--keep-experts", kept, "--overwrite", "--json"]
    ways = {
        "python": Way([sys.executable, "-c", "pass"]),
        "inspect": Way(tool("inspect", source, "--json"), source),
        "retop --link": Way(tool("retop", source, out, "--top-k", "4", "--link", "--overwrite", "--json"), source),
        "prune --dry-run": Way(tool(*prune, "--dry-run"), source),
        "prune --keep-experts": Way(tool(*prune), source),
        "verify": Way(tool("verify", pruned, "--json"), source),
        "verify --source": Way(tool("verify", pruned, "--source", source, "--json"), source),
    }
    figures = {name: Figures() for name in ways}
    for run in range(-1, arguments.runs):
        for name, way in ways.items():
            measure(way, figures[name], scratch, memory=run < 0)
    return figures


if __name__ == "__main__":
    main()
