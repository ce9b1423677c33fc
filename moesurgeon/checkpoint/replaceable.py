"""Which folders ``--overwrite`` may replace: those that are what is written here, and hold nothing else.

A folder has to be recognised by a file with certain keys, and every file and folder in it has to be part of such a
folder. What is not (a ``.git``, sources, notes) is named, and nothing is touched.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moesurgeon.checkpoint.open import CONFIG_NAME, PROVENANCE_NAME
from moesurgeon.errors import UsageError

_NAMED = 3  # strangers that a message names


@dataclass(frozen=True)
class Contents:
    """Patterns of the names of ``files``, and by pattern the contents that ``folders`` may have, one or another."""

    files: tuple[str, ...] = ()
    folders: Mapping[str, tuple[Contents, ...]] = field(default_factory=dict)
    record: str | None = None
    """A JSON file whose ``files`` lists what was written beside it, as paths within the folder. Where it is there, no
    other file is part of the folder."""

    def strangers(self, folder: Path) -> list[str]:
        """Return what in ``folder`` is no part of it, as paths within it; folders with a slash."""
        return sorted(self._strangers(folder, "", _recorded(folder, self.record)))

    def _strangers(self, folder: Path, place: str, recorded: frozenset[str]) -> list[str]:
        found = []
        for path in folder.iterdir():
            name = f"{place}{path.name}"
            if path.is_dir() and not path.is_symlink():
                kinds = next((kinds for like, kinds in self.folders.items() if fnmatch.fnmatch(path.name, like)), None)
                if kinds is not None:
                    fewest = min((kind.strangers(path) for kind in kinds), key=len)
                    found += [f"{name}/{stranger}" for stranger in fewest]
                elif any(each.startswith(f"{name}/") for each in recorded):
                    found += Contents()._strangers(path, f"{name}/", recorded)
                else:
                    found.append(f"{name}/")
            elif recorded:
                if name not in recorded and path.name != self.record:
                    found.append(name)
            elif not any(fnmatch.fnmatch(path.name, like) for like in self.files):
                found.append(name)
        return found


@dataclass(frozen=True)
class Kind:
    """What a folder is ``called``, the JSON file by which it is ``known`` with one of these ``keys`` (none: any file),
    files of which it ``has`` one, and its ``contents``."""

    called: str
    known: str
    keys: tuple[str, ...]
    contents: Contents
    has: tuple[str, ...] = ("*",)

    def is_kind_of(self, folder: Path) -> bool:
        """Whether ``folder`` is of this kind, whatever else is in it."""
        names = [path.name for path in folder.iterdir()]
        if self.known not in names or not any(fnmatch.fnmatch(name, like) for name in names for like in self.has):
            return False
        try:
            said = json.loads((folder / self.known).read_text(encoding="utf-8")) if self.keys else None
        except (OSError, ValueError, RecursionError):
            return False
        return not self.keys or (isinstance(said, dict) and any(key in said for key in self.keys))


class _Anything(Contents):
    def strangers(self, folder: Path) -> list[str]:
        return []


ANYTHING = _Anything()
_DOWNLOADED = Contents(folders={"huggingface": (ANYTHING,)})  # where the hub's client keeps what it needs to go on
_COMPILED = Contents(files=("*.pyc",))

# As checkpoints come from the hub. No pattern for all .json, .txt and .py: those may be anybody's notes and sources.
# Nor for all weights: an optimiser's state, an adapter or a GGUF file may be the only one of its kind.
CHECKPOINT = Kind(
    "a checkpoint",
    CONFIG_NAME,
    ("model_type", "architectures"),
    Contents(
        files=(
            "model*.safetensors", "mtp*.safetensors", "consolidated*.safetensors", "consolidated*.pth",
            "pytorch_model*.bin", "*.model", "*.tiktoken", "*.jinja",
            "*config.json", "*.index.json", "*.index.*.json", "tokenizer*.json", "special_tokens_map.json",
            "added_tokens.json", "vocab*.json", "tekken.json", "chat_template.json", "params.json",
            PROVENANCE_NAME, "merges.txt", "vocab.txt", "LICEN[SC]E*", "NOTICE*", "*NOTICES*", "*POLICY*",
            "README*", "MODEL_CARD*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp",
            "configuration_*.py", "modeling_*.py", "modular_*.py", "tokenization_*.py", "processing_*.py",
            "image_processing_*.py", "feature_extraction_*.py", "generation_utils.py", "__init__.py",
            "recipe.yaml", ".gitattributes", ".gitignore", ".DS_Store",
        ),
        folders={
            ".cache": (_DOWNLOADED,), "__pycache__": (_COMPILED,),
            "additional_chat_templates": (Contents(files=("*.jinja",)),),
        },
        record=PROVENANCE_NAME,
    ),
    has=("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", PROVENANCE_NAME),
)  # fmt: skip


def refuse_strange(folder: Path, kind: Kind) -> None:
    """Raise UsageError if ``folder`` is not of ``kind``, or holds what is no part of one."""
    if not kind.is_kind_of(folder):
        raise UsageError(
            f"{folder} is not {kind.called} (by its {kind.known}), so --overwrite does not replace it; choose "
            "another folder"
        )
    if strangers := kind.contents.strangers(folder):
        more = f" and {len(strangers) - _NAMED} more" if len(strangers) > _NAMED else ""
        raise UsageError(
            f"{folder} holds what is no part of {kind.called} ({', '.join(strangers[:_NAMED])}{more}), so --overwrite "
            "does not replace it; move that away or choose another folder"
        )


def _recorded(folder: Path, record: str | None) -> frozenset[str]:
    """Return the paths of files that the record says were written; none where there is no record."""
    try:
        said = json.loads((folder / record).read_text(encoding="utf-8"))["files"] if record else []
        return frozenset(name for name in said if isinstance(name, str))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return frozenset()
