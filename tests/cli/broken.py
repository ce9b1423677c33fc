"""Checkpoints that cannot be used, each broken in one way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moesurgeon.checkpoint.locate import builtin_checkpoints

SHARD = "model-00002-of-00004.safetensors"


def whole(folder: Path, name: str = "tiny-mixtral") -> Path:
    """Copy a builtin checkpoint to break it."""
    shutil.copytree(builtin_checkpoints()[name], folder)
    return folder


def with_config(**changes: Any) -> Callable[[Path], None]:
    """A checkpoint whose config says something else than its tensors; None removes a key."""

    def make(folder: Path) -> None:
        path = whole(folder) / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return make


def with_file(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A checkpoint with another file of this name."""

    def make(folder: Path) -> None:
        (whole(folder) / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def a_file(folder: Path) -> None:
    folder.write_text("no folder")


def empty(folder: Path) -> None:
    folder.mkdir()


def _tiny(folder: Path, config: dict[str, Any], mlp: list[str]) -> None:
    """A model of one layer with little in it."""
    folder.mkdir()
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    names += [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    names += [f"model.layers.0.{part}" for part in mlp]
    save_file({name: torch.zeros(4, 4) for name in names}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 4, "vocab_size": 4, **config}
    (folder / "config.json").write_text(json.dumps(config))


def dense(folder: Path) -> None:
    mlp = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    _tiny(folder, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, mlp)


def unknown(folder: Path) -> None:
    mlp = [f"mlp.experts.{expert}.{part}_proj.weight" for expert in (0, 1) for part in ("gate", "up", "down")]
    config = {"model_type": "frobnicator", "num_experts": 2, "num_experts_per_tok": 1}
    _tiny(folder, config, [*mlp, "mlp.gate.weight"])


def other_weights(folder: Path) -> None:
    """A config of Mixtral with the weights of a dense model."""
    dense(folder)
    (folder / "config.json").write_bytes((builtin_checkpoints()["tiny-mixtral"] / "config.json").read_bytes())


def truncated(folder: Path) -> None:
    shard = whole(folder) / SHARD
    shard.write_bytes(shard.read_bytes()[:-1000])


def missing_shard(folder: Path) -> None:
    (whole(folder) / SHARD).unlink()


def swapped(folder: Path) -> None:
    other = whole(folder) / "model-00003-of-00004.safetensors"
    (folder / SHARD).rename(folder / "aside")
    other.rename(folder / SHARD)
    (folder / "aside").rename(other)


def pickled(folder: Path) -> None:
    whole(folder)
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")


def huge_config(folder: Path) -> None:
    with (whole(folder) / "config.json").open("r+b") as config:
        config.truncate(20_000_000)  # a sparse file: nothing is written


def escaping_index(folder: Path) -> None:
    path = whole(folder) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../../model.safetensors"
    path.write_text(json.dumps(index))


def stray(folder: Path) -> None:
    """A second set of weights, which transformers loads before those of the index."""
    save_file({"model.norm.weight": torch.ones(4)}, whole(folder) / "model.safetensors")


_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"

# By name: how it is made, and two things that the message says: what is wrong, and what to do.
UNREADABLE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing": (lambda folder: None, "does not exist", "give the folder"),
    "a-file": (a_file, "is a file", "give the folder"),
    "empty": (empty, "config.json is missing", "incomplete"),
    "dense": (dense, "dense model", "nothing to do"),
    "unknown": (unknown, "'frobnicator' is not known", "moesurgeon knows mixtral"),
    "other-weights": (other_weights, "no tensor is named like its experts", "another model's"),
    "truncated": (truncated, f"{SHARD} is truncated", "download or convert it again"),
    "missing-shard": (missing_shard, f"{SHARD} is missing", "download the others"),
    "lfs-pointer": (with_file(SHARD, _POINTER), f"{SHARD} in", "run git lfs pull"),
    "swapped": (swapped, "places", "but it is in"),
    "pickled": (pickled, "pickled weights (pytorch_model.bin)", "convert it with"),
    "json-bomb": (with_file("config.json", "[" * 200_000), "config.json is not valid JSON", "download"),
    "huge-config": (huge_config, "config.json has 20000000 bytes", "no file of a checkpoint"),
    "no-json": (with_file("config.json", "model_type: mixtral\n"), "config.json is not valid JSON", "download"),
    "json-list": (with_file("config.json", "[]"), "config.json is not a JSON object", "download"),
    "binary-config": (with_file("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON", "download"),
    "no-model-type": (with_config(model_type=None), "config.json has no model_type", "knows mixtral"),
    "two-counts": (with_config(num_experts=6), "num_local_experts = 8 and num_experts = 6", "keep one"),
    "count-of-words": (with_config(num_local_experts="eight"), "num_local_experts = 'eight'", "restore"),
    "endless-layers": (with_config(num_hidden_layers=10**15), "num_hidden_layers", "restore"),
    "no-top-k": (with_config(num_experts_per_tok=None), "lacks num_experts_per_tok", "restore"),
    "index-list": (with_file("model.safetensors.index.json", "[]"), "is not a JSON object", "download"),
    "escaping-index": (escaping_index, "'../../model.safetensors'", "refused"),
}

# These can be read, but do not fit together: inspect lists what is wrong, the others refuse.
CONTRADICTORY: dict[str, tuple[Callable[[Path], None], str]] = {
    "fewer-experts": (with_config(num_local_experts=7), "7 experts"),
    "more-experts": (with_config(num_local_experts=9), "9 experts"),
    "fewer-layers": (with_config(num_hidden_layers=3), "layers"),
    "more-layers": (with_config(num_hidden_layers=5), "layers [4] should have experts"),
    "other-width": (with_config(hidden_size=64), "shape"),
    "top-9": (with_config(num_experts_per_tok=9), "top 9 of 8 experts"),
    "stray": (stray, "transformers loads that one file"),
}
