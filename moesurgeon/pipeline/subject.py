"""The checkpoint that an operation works on: located, opened, recognised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moesurgeon.checkpoint.beside import Beside, look_beside
from moesurgeon.checkpoint.compare import look_the_same
from moesurgeon.checkpoint.locate import locate
from moesurgeon.checkpoint.open import INDEX_NAME, Checkpoint, open_checkpoint
from moesurgeon.checkpoint.reader import Identity, identity_of
from moesurgeon.errors import CheckpointError
from moesurgeon.surgery.anatomy import Anatomy, examine
from moesurgeon.surgery.claims import broken_claims
from moesurgeon.surgery.completeness import problems_of
from moesurgeon.surgery.expert_rules import not_pruned
from moesurgeon.surgery.routers import odd_routers

# Where ModelOpt, AutoGPTQ and AutoAWQ say how weights are quantised.
_QUANTISERS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


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

    @cached_property
    def beside(self) -> Beside:
        """What lies in the folder besides the checkpoint."""
        return look_beside(self.checkpoint)

    @cached_property
    def problems(self) -> list[str]:
        """Why this is no whole checkpoint that every loader takes alike, a line each; empty if it is one."""
        return [*self.beside.redirects, *problems_of(self.anatomy)]

    @cached_property
    def warnings(self) -> list[str]:
        """What some loaders mind, and what an edit copies as it is."""
        elsewhere = any((self.root / name).is_file() for name in _QUANTISERS)
        return [
            *self.beside.warnings,
            *_other_size(self.checkpoint),
            *broken_claims(self.anatomy, quantised_elsewhere=elsewhere),
            *_other_head(self),
            *not_pruned(self.anatomy, self.root),
        ]

    @cached_property
    def odd_routers(self) -> list[str]:
        """What is odd in the numbers of the routers, which are read for it."""
        return list(odd_routers(self.anatomy, self.checkpoint))

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that the config names, as torch spells it."""
        dtype = self.checkpoint.config.get("dtype") or self.checkpoint.config.get("torch_dtype")
        return str(dtype).removeprefix("torch.") if dtype else None


def open_subject(name: str, *, complete: bool = True) -> Subject:
    """Open the checkpoint that ``name`` means and, with ``complete``, refuse one with problems."""
    try:
        checkpoint = open_checkpoint(locate(name))
    except OSError as error:
        raise CheckpointError(f"{name[:200]} cannot be read ({error.strerror}); check path and permissions") from error
    anatomy = examine(checkpoint.config, checkpoint.tensors)
    subject = Subject(name, checkpoint, anatomy)
    if complete and subject.problems:
        raise CheckpointError(first_of(subject.problems))
    return subject


def _other_size(checkpoint: Checkpoint) -> Iterator[str]:
    """Loaders take the index's total for what they report and reserve, not for what they read."""
    stated = checkpoint.index_metadata.get("total_size")
    if stated is not None and stated != checkpoint.nbytes:
        yield f"{INDEX_NAME} counts {str(stated)[:40]} bytes (total_size), the shards hold {checkpoint.nbytes}"


def _other_head(subject: Subject) -> Iterator[str]:
    family, config = subject.anatomy.family, subject.anatomy.config
    names = family.head, family.embedding
    if (
        not config.get("tie_word_embeddings", family.tied_by_default)
        or not {*names} <= subject.checkpoint.tensors.keys()
    ):
        return
    if not look_the_same(subject.checkpoint, *names):
        yield (
            f"config.json ties the head to the embedding, but another {family.head} is stored: transformers takes the "
            "stored one, vLLM the embedding; set tie_word_embeddings to false"
        )


def few(names: Sequence[str]) -> str:
    """Name the first of ``names``, and count the others."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def first_of(problems: Sequence[str]) -> str:
    """Return the first of ``problems``, and how many more there are."""
    more = f" (and {len(problems) - 1} more: see moesurgeon inspect)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"
