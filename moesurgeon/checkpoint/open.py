"""Opening a checkpoint folder: config, index, and every shard's header; no tensor is read.

Untrusted input: shard names may not leave the folder, sizes are bounded, weights in pickle formats
are never opened.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.header import Header, StoredTensor, parse_json, read_header
from moesurgeon.checkpoint.pointers import read_by_loaders, refuse_pointers
from moesurgeon.errors import CheckpointError, and_more

INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
PROVENANCE_NAME = "moesurgeon.json"
# A JSON bomb must not eat the memory. DeepSeek-V3's index, the largest we know, has 9 MB.
_MAX_JSON_BYTES = 100_000_000
_MAX_CONFIG_BYTES = 16_000_000
# What we may still have to walk through by recursion; configs nest to 4 or 5.
_MAX_DEPTH = 64
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk, known by its headers.

    ``tensors`` maps names to where their bytes are, in the order of the shards and of the bytes in
    them; ``is_sharded`` tells whether there is an index file.
    """

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    headers: Mapping[str, Header]
    is_sharded: bool
    index_metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def path_of(self, shard: str) -> Path:
        return self.root / shard


def open_checkpoint(root: Path) -> Checkpoint:
    """Read ``config.json``, the index if there is one, and the headers of all shards.

    Raises CheckpointError if something is missing, damaged or contradictory.
    """
    if not root.exists():
        raise CheckpointError(f"{root} does not exist; give the folder of a checkpoint")
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file; give the folder that holds config.json and the shards")
    for path in root.iterdir():
        if path.is_symlink() and (path.exists() or path.suffix != ".safetensors"):  # of missing shards all are named
            _inside(root, path.name)  # also of files that others read: tokenizer, card, licence
    refuse_pointers(root, read_by_loaders(root))
    if (root / ADAPTER_NAME).exists() and not (root / CONFIG_NAME).exists():
        raise CheckpointError(
            f"{root} holds an adapter, not a model; merge it into its base with peft: "
            "model.merge_and_unload().save_pretrained(...)"
        )
    config = read_json_file(root, CONFIG_NAME)
    index: dict[str, Any] = {}
    if (root / INDEX_NAME).exists():
        index = read_json_file(root, INDEX_NAME)
        weight_map = _weight_map(index)
        shards = sorted(set(weight_map.values()))
    elif (root / SINGLE_NAME).exists():
        weight_map, shards = {}, [SINGLE_NAME]
    else:
        raise CheckpointError(_no_weights(root))
    _refuse_missing(root, shards)
    refuse_pointers(root, shards)
    names = {name: name for name in weight_map}
    headers = {shard: read_header(_inside(root, shard), shard, names) for shard in shards}
    tensors: dict[str, StoredTensor] = {}
    for shard, header in headers.items():
        for tensor in header.tensors:
            if tensor.name in tensors:
                other = tensors[tensor.name].shard
                raise CheckpointError(
                    f"{tensor.name!r} is in both {other} and {shard}; the folder mixes two checkpoints"
                )
            tensors[tensor.name] = tensor
    if weight_map:
        _check_index(weight_map, tensors)
    if not tensors:
        raise CheckpointError(f"{root} holds no tensors")
    metadata = index.get("metadata", {})
    return Checkpoint(root, config, tensors, headers, bool(weight_map), metadata if isinstance(metadata, dict) else {})


def read_json_file(root: Path, name: str) -> dict[str, Any]:
    """Read the JSON object in ``root/name``; CheckpointError if it is missing, huge, malformed or nested deep."""
    path = _inside(root, name)
    if path.stat().st_size > (_MAX_CONFIG_BYTES if name == CONFIG_NAME else _MAX_JSON_BYTES):
        raise CheckpointError(f"{name} has {path.stat().st_size} bytes; that is no file of a checkpoint")
    value = parse_json(path.read_bytes(), name)
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
        # Configs hold them (time_step_limit), what goes into our own JSON must not.
        if name != CONFIG_NAME and any(isinstance(child, float) and not math.isfinite(child) for child in level):
            raise CheckpointError(f"{name} holds a number that is none (NaN or infinite); it was changed by hand")
    if level:
        raise CheckpointError(f"{name} is nested more than {_MAX_DEPTH} deep; that is no file of a checkpoint")
    return value


def _refuse_missing(root: Path, shards: Sequence[str]) -> None:
    """Raise CheckpointError with the shards that the index names and the folder lacks, and those that are there."""
    missing = [shard for shard in shards if not _plain(root, shard).exists()]
    if not missing:
        return
    there = [shard for shard in shards if shard not in missing]
    found = f"there are {len(there)} of {len(shards)} shards ({_few(there)})" if there else "no shard is there"
    raise CheckpointError(
        f"{_few(missing)} {'is' if len(missing) == 1 else 'are'} missing from {root}; {found}: download the others"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _inside(root: Path, name: str) -> Path:
    """Return ``root/name`` if it is a regular file that lies in the checkpoint.

    Links are followed inside the folder, and from a hub cache's snapshot to the blobs beside it.
    """
    path = _plain(root, name)
    if not path.exists():
        raise CheckpointError(f"{name} is missing from {root}; the checkpoint is incomplete")
    target, home = path.resolve(), root.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(f"{name} is a link that leaves {root}; refused: copy the file there instead")
    if not target.is_file():
        raise CheckpointError(f"{name} in {root} is not a regular file")
    return path


def _plain(root: Path, name: str) -> Path:
    """Return ``root/name`` if ``name`` is a plain file name."""
    if not name or len(name.encode()) > 255 or any(sign in name for sign in "/\\\0") or name in (".", ".."):
        raise CheckpointError(f"the checkpoint names {name[:80]!r} as one of its files; refused: not a plain file name")
    return root / name


def _weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME} has no weight_map; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_NAME} names {str(shard)[:80]!r}, which is no safetensors file; convert it")
        weight_map[name] = sys.intern(shard)  # parsed, each tensor has a string of its own
    return weight_map


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{INDEX_NAME} promises {name!r} in {shard}, which does not hold it; download both again"
            )
        if tensors[name].shard != shard:
            raise CheckpointError(
                f"{INDEX_NAME} places {name!r} in {shard}, but it is in "
                f"{tensors[name].shard}; the shards were renamed or mixed up, download them again"
            )
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{tensors[unlisted[0]].shard} holds {and_more([repr(name) for name in unlisted])} that {INDEX_NAME} "
            "does not list; the index belongs to another checkpoint"
        )


def _no_weights(root: Path) -> str:
    pickles = [path.name for pattern in _PICKLES for path in sorted(root.glob(pattern))]
    if pickles:
        return (
            f"{root} holds pickled weights ({pickles[0]}), which can run code and are never opened; convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    others = sorted(path.name for path in root.glob("*.safetensors"))
    if others:
        return (
            f"{root} holds {and_more(others)}, but no {INDEX_NAME} that says which tensor is "
            f"where; download the index, or call a single file {SINGLE_NAME}"
        )
    return f"{root} holds neither {INDEX_NAME} nor {SINGLE_NAME}; it is not a safetensors checkpoint"
