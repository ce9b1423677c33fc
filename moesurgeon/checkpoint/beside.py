"""What lies beside the weights that were opened, and what other loaders make of it.

Loaders do not agree on which files are the model. Read in transformers 5.23 and tried: it takes
``model.safetensors`` before an index, follows ``transformers_weights`` and ``configuration_files`` in config.json,
and puts an adapter in the same folder on top of the weights. vLLM and SGLang go by the index, and without one take
every ``*.safetensors``; llama.cpp's converter takes every ``model*.safetensors``. Tried and harmless: pickles, TF,
Flax and GGUF weights beside safetensors, ``_name_or_path``, a generation config that is no JSON, sub-folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moesurgeon.checkpoint.auxiliary import left_out
from moesurgeon.checkpoint.open import ADAPTER_NAME, INDEX_NAME, SINGLE_NAME, Checkpoint, read_json_file
from moesurgeon.errors import CheckpointError

# torch's own names of what weights are loaded in.
_DTYPES = (
    "auto",
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "double",
    "float",
    "half",
)
GENERATION_NAME = "generation_config.json"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_END, _BLANKS = 256, b" \t\r\n\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Beside:
    """``redirects``: why a loader takes something else than what was opened, or nothing; a line each.

    ``warnings``: what only some loaders mind. ``left_out``: files and folders that no copy carries along.
    """

    redirects: tuple[str, ...]
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]


def look_beside(checkpoint: Checkpoint) -> Beside:
    """Return what is in the folder of ``checkpoint`` besides the checkpoint."""
    return Beside(
        tuple(
            [
                *_other_weights(checkpoint),
                *_other_config(checkpoint),
                *_generation(checkpoint.root),
                *_tokenizer(checkpoint.root),
            ]
        ),
        tuple([*_other_shards(checkpoint), *_remote_code(checkpoint)]),
        tuple(left_out(checkpoint.root, checkpoint.headers)),
    )


def _other_weights(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.is_sharded and (checkpoint.root / SINGLE_NAME).exists() and set(checkpoint.headers) != {SINGLE_NAME}:
        yield (
            f"{SINGLE_NAME} lies beside {INDEX_NAME}: transformers loads that one file, vLLM the shards of the index; "
            "move away the one that is out of date"
        )
    if (checkpoint.root / ADAPTER_NAME).exists():
        yield (
            f"{ADAPTER_NAME} lies beside the weights: transformers puts the adapter on top of them, or fails without "
            "it, vLLM does not; merge it with peft (merge_and_unload) or move it away"
        )


def _other_config(checkpoint: Checkpoint) -> Iterator[str]:
    named = checkpoint.config.get("transformers_weights")
    if named is not None:
        yield (
            f"config.json names its weights itself (transformers_weights: {str(named)[:80]}), which transformers alone "
            "follows; remove the key"
        )
    files = checkpoint.config.get("configuration_files")
    if files:
        yield (
            f"config.json hands over to other files by version (configuration_files: {str(files)[:80]}), which "
            "transformers alone follows; keep the one that is meant as config.json, without the key"
        )
    for key in ("dtype", "torch_dtype"):
        dtype = checkpoint.config.get(key)
        if isinstance(dtype, str) and dtype.removeprefix("torch.") not in _DTYPES:
            yield f"config.json gives {key} = {dtype[:40]!r}, which transformers does not load; restore it"


def _generation(root: Path) -> Iterator[str]:
    if not (root / GENERATION_NAME).is_file():
        return
    try:
        read_json_file(root, GENERATION_NAME)
    except CheckpointError as error:
        yield f"{error}, or delete it: defaults are taken then"


def _tokenizer(root: Path) -> Iterator[str]:
    """Yield what is cut off or no object; the large one is looked at from both ends only."""
    for name in TOKENIZER_NAMES:
        if (root / name).is_file() and not _is_whole_object(root / name):
            yield f"{name} is no whole JSON object, so that loaders fail on it or read other text; copy it again"


def _is_whole_object(path: Path) -> bool:
    with path.open("rb") as file:
        begins = file.read(_END).lstrip(_BLANKS)[:1]
        file.seek(max(0, path.stat().st_size - _END))
        return begins == b"{" and file.read().rstrip(_BLANKS)[-1:] == b"}"


def _other_shards(checkpoint: Checkpoint) -> Iterator[str]:
    others = sorted(path.name for path in checkpoint.root.glob("*.safetensors") if path.name not in checkpoint.headers)
    others = [name for name in others if name != SINGLE_NAME and not name.startswith("adapter_model")]
    read_as_parts = [name for name in others if name.startswith("model")]
    if read_as_parts:
        yield (
            f"{_few(read_as_parts)} beside the weights and no part of them: llama.cpp's converter takes every "
            "model*.safetensors, and vLLM every *.safetensors where there is no index; move them away"
        )
    if predicting := [name for name in others if name.startswith("mtp") and checkpoint.is_sharded]:
        yield (
            f"{_few(predicting)} beside the shards and no part of the index: SGLang adds it to them, and no edit "
            "changes or copies it"
        )
    if others and not read_as_parts and not checkpoint.is_sharded:
        yield (
            f"{_few(others)} beside {SINGLE_NAME} and no part of it: vLLM and SGLang take every *.safetensors where "
            "there is no index; move them away"
        )


def _remote_code(checkpoint: Checkpoint) -> Iterator[str]:
    """Name the modules that auto_map promises and the folder lacks; those of other repositories have ``--``."""
    auto_map = checkpoint.config.get("auto_map")
    if not isinstance(auto_map, dict):
        return
    named = {str(one) for value in auto_map.values() for one in (value if isinstance(value, list) else [value]) if one}
    modules = sorted({f"{name.partition('.')[0]}.py" for name in named if "--" not in name})
    missing = [module for module in modules if not (checkpoint.root / module).exists()]
    if missing:
        yield (
            f"config.json's auto_map names {', '.join(missing[:4])[:200]}, which the folder lacks: loading it with "
            "trust_remote_code fails; add the file or remove auto_map"
        )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'lies' if len(names) == 1 else 'lie'}"
