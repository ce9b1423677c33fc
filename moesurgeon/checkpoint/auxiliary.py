"""The files around the weights: tokenizer, chat template, generation config, licence, model card."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Container
from pathlib import Path

from moesurgeon.checkpoint.open import CONFIG_NAME, INDEX_NAME, PROVENANCE_NAME

# Weights in any format (stale beside edited ones), their indexes by any variant, what describes them in other
# formats (Mistral's params.json counts experts, an adapter's config redirects loaders), training states.
_STALE = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.npz",
    "*.npy", "*.pkl", "*.pickle", "*.nemo", "*.distcp", "*.ot", "*.tar", "*.zip", "*.gz", "*.incomplete",
    "*.index.json", "*.index.*.json", "params.json", "adapter_config.json", "config.*.json", "trainer_state.json",
)  # fmt: skip
# What we write ourselves, and the hub's own files.
_OURS = (CONFIG_NAME, INDEX_NAME, PROVENANCE_NAME, "README.md", ".*")


# Folders of plain files that belong to the tokenizer.
_FOLDERS = ("additional_chat_templates",)


def auxiliary_files(root: Path) -> list[Path]:
    """Return the files of a checkpoint folder that an edited copy needs besides its weights."""
    return [path for path in sorted(root.iterdir()) if path.is_file() and not _matches(path.name, *_STALE, *_OURS)]


def left_out(root: Path, shards: Container[str]) -> list[str]:
    """Return the names of the files and folders (with a slash) of a checkpoint folder that no copy has in any form.

    ``shards``: the files of weights, which are written anew. Hidden files do not count.
    """
    files = [path.name for path in root.iterdir() if path.is_file() and _matches(path.name, *_STALE)]
    folders = [path.name for path in root.iterdir() if path.is_dir() and path.name not in _FOLDERS]
    return sorted(
        [name for name in files if name not in shards and not _matches(name, *_OURS)]
        + [f"{name}/" for name in folders if not name.startswith(".")]
    )


def _matches(name: str, *patterns: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def copy_auxiliary(root: Path, target: Path) -> None:
    """Copy the auxiliary files of ``root`` into the folder ``target`` (contents, not links)."""
    for path in auxiliary_files(root):
        shutil.copyfile(path, target / path.name)
    for name in _FOLDERS:
        if (root / name).is_dir():
            (target / name).mkdir()
            for path in sorted((root / name).iterdir()):
                if path.is_file() and not path.is_symlink():  # a link could lead anywhere
                    shutil.copyfile(path, target / name / path.name)
