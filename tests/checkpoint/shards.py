"""A small checkpoint that is no model: for tests of bytes, where no name means anything."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

CONFIG = {"model_type": "none", "num_hidden_layers": 2}
INDEX = "model.safetensors.index.json"


def some_tensors(count: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tensors of several dtypes and ranks, an empty one and a scalar among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 4), (3,), (2, 3, 5), (), (0, 4), (16, 2)]
    dtypes = [torch.bfloat16, torch.float32, torch.uint8, torch.float16, torch.int64, torch.float8_e4m3fn]
    tensors = {}
    for number in range(count):
        shape, dtype = shapes[number % len(shapes)], dtypes[number % len(dtypes)]
        tensors[f"t{number}"] = (torch.rand(shape, generator=generator) * 50).to(dtype)
    return tensors


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def save_shards(folder: Path, parts: Sequence[Mapping[str, torch.Tensor]], config: Any = None) -> Path:
    """Save one shard per part, and an index if there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if len(parts) == 1:
        save_file(dict(parts[0]), folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(dict(part), folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_raw(folder: Path, raw: bytes) -> Path:
    """Save ``raw`` as the only shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(raw)
    return folder


def valid_shard() -> bytes:
    return save(some_tensors(), {"format": "pt"})


def taken_apart(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the parsed header and the data behind it."""
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_together(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
