"""The checkpoint that an operation works on: located, opened, recognised."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moesurgeon.checkpoint.locate import locate
from moesurgeon.checkpoint.open import Checkpoint, open_checkpoint
from moesurgeon.checkpoint.reader import Identity, identity_of
from moesurgeon.errors import CheckpointError
from moesurgeon.surgery.anatomy import Anatomy, examine
from moesurgeon.surgery.completeness import require_complete


@dataclass(frozen=True)
class Subject:
    """``name`` is what the user typed."""

    name: str
    checkpoint: Checkpoint
    anatomy: Anatomy

    @property
    def root(self) -> Path:
        return self.checkpoint.root

    @cached_property
    def identity(self) -> Identity:
        return identity_of(self.checkpoint)

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that the config names, as torch spells it."""
        dtype = self.checkpoint.config.get("dtype") or self.checkpoint.config.get("torch_dtype")
        return str(dtype).removeprefix("torch.") if dtype else None


def open_subject(name: str, *, complete: bool = True) -> Subject:
    """Open the checkpoint that ``name`` means and, with ``complete``, refuse one with gaps."""
    try:
        checkpoint = open_checkpoint(locate(name))
    except OSError as error:
        raise CheckpointError(f"{name[:200]} cannot be read ({error.strerror}); check path and permissions") from error
    anatomy = examine(checkpoint.config, checkpoint.tensors)
    if complete:
        require_complete(anatomy)
    return Subject(name, checkpoint, anatomy)
