"""The files around the weights: tokenizer, chat template, generation config, licence, model card."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

from moesurgeon.checkpoint.open import CONFIG_NAME, PROVENANCE_NAME

# Weights in any format (stale beside edited ones), what we write ourselves, and the hub's own files.
_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz",
    "*.index.json", CONFIG_NAME, PROVENANCE_NAME, "README.md", ".*",
)  # fmt: skip


# Folders of plain files that belong to the tokenizer.
_FOLDERS = ("additional_chat_templates",)


def auxiliary_files(root: Path) -> list[Path]:
    """Return the files of a checkpoint folder that an edited copy needs besides its weights."""
    return [
        path
        for path in sorted(root.iterdir())
        if path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_COPIED)
    ]


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
