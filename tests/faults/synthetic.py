"""A Mixtral of random bytes, large enough to be interrupted while it is written."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from moesurgeon.checkpoint.header import TensorSpec, build_header

HIDDEN, WIDE, EXPERTS, LAYERS, VOCABULARY = 256, 640, 8, 4, 512


def synthetic(folder: Path) -> Path:
    """Save some 34 MB in six shards; bfloat16 by name, but nothing here looks at values."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    shards: list[list[TensorSpec]] = [[_spec("model.embed_tokens.weight", VOCABULARY, HIDDEN)]]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        block = [_spec(f"{prefix}self_attn.{part}_proj.weight", HIDDEN, HIDDEN) for part in "qkvo"]
        block += [_spec(f"{prefix}{part}_layernorm.weight", HIDDEN) for part in ("input", "post_attention")]
        block += [_spec(f"{prefix}block_sparse_moe.gate.weight", EXPERTS, HIDDEN)]
        for expert in range(EXPERTS):
            for part, shape in (("w1", (WIDE, HIDDEN)), ("w2", (HIDDEN, WIDE)), ("w3", (WIDE, HIDDEN))):
                block.append(_spec(f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight", *shape))
        shards.append(block)
    shards.append([_spec("model.norm.weight", HIDDEN), _spec("lm_head.weight", VOCABULARY, HIDDEN)])
    places = {}
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        data = build_header(specs, {"format": "pt"}) + os.urandom(sum(spec.nbytes for spec in specs))
        (folder / name).write_bytes(data)
        places |= {spec.name: name for spec in specs}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """Return a hash of every file below ``folder``, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "BF16", shape)
