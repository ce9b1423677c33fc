"""From what the user typed to a folder: a local path, ``builtin:NAME`` or ``hf://org/name``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from moesurgeon.errors import CheckpointError, UsageError

BUILTIN = "builtin:"
HUB = "hf://"
# Everything that a checkpoint consists of, and nothing that could run: no pickles.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*", "NOTICE*"]


def builtin_checkpoints() -> dict[str, Path]:
    """Return the checkpoints that come with moesurgeon, by name."""
    folder = Path(str(files("moesurgeon.builtin")))
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}


def locate(text: str) -> Path:
    """Return the folder that ``text`` means.

    Only ``hf://org/name[@revision]`` uses the network. Raises UsageError for an unknown builtin name
    and CheckpointError if the hub does not have the repository.
    """
    if text.startswith(BUILTIN):
        known = builtin_checkpoints()
        name = text.removeprefix(BUILTIN)
        if name not in known:
            raise UsageError(f"no builtin checkpoint is called {name!r}; there are {', '.join(known)}")
        return known[name]
    if text.startswith(HUB):
        return _download(text.removeprefix(HUB))
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{text} does not exist: there is no such home; give the folder") from error


def _download(repository: str) -> Path:
    # Imported here: the only use of the network, and slow to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise UsageError(f"hf://{repository} is not of the form hf://org/name[@revision]") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"hf://{repository} could not be downloaded: {reason}") from error
