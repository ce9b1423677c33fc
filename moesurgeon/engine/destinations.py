"""Which stored tensor goes where in the running model.

transformers 5 holds all experts of a layer in two parameters, gate_up_proj [E, 2F, H] and down_proj
[E, H, F]; checkpoints mostly store them expert by expert. A stored tensor goes straight into its part of
the parameter, so that no second copy of a layer ever exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from moesurgeon.engine.skeleton import Skeleton
from moesurgeon.errors import CheckpointError, and_more
from moesurgeon.surgery.anatomy import Anatomy, Role

# Scales of FP8 weights, by blocks; other spellings and formats are not dequantised here.
_SCALE = "_scale_inv"
_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32")
_FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class Piece:
    """The stored tensor ``source`` as a part of a target: all of it, or of its ``expert`` the ``rows``.

    ``scale``: the stored tensor with the scales by which it is dequantised.
    """

    source: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    scale: str | None = None

    def view(self, target: torch.Tensor) -> torch.Tensor:
        """Return the part of ``target`` that this piece fills; contiguous."""
        if self.expert is None:
            return target
        matrix = target[self.expert]
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Destinations:
    """``pieces``: the parts that each target is put together from. ``scale_block``: rows and columns of FP8 blocks."""

    pieces: Mapping[str, tuple[Piece, ...]]
    scale_block: tuple[int, int]

    @cached_property
    def target_of(self) -> Mapping[str, tuple[str, Piece]]:
        """By stored name where it goes."""
        return {piece.source: (target, piece) for target, pieces in self.pieces.items() for piece in pieces}


def destinations_of(anatomy: Anatomy, skeleton: Skeleton) -> Destinations:
    """Find the place of every stored tensor in ``skeleton``.

    Layers for multi-token prediction, which plain models do not run, have none. Raises CheckpointError if
    a target stays empty, if a tensor has no place or another shape, or if it is quantised in a way that
    is not known here: a model never runs with weights that are not the checkpoint's.
    """
    pieces: dict[str, list[Piece]] = {}
    for name, role in anatomy.roles.items():
        if (role.layer is not None and role.layer >= anatomy.layers) or name.endswith(_SCALE):
            continue
        target, piece = _placed(anatomy, name, role)
        pieces.setdefault(target, []).append(piece)
    pieces = {_primary(skeleton, target, pieces): parts for target, parts in pieces.items()}
    for what, names in (
        ("lacks", skeleton.targets.keys() - pieces),
        ("has the unknown", pieces.keys() - skeleton.targets),
    ):
        if names:
            stored = sorted({pieces[name][0].source if name in pieces else name for name in names})
            raise CheckpointError(f"this {anatomy.family.title} checkpoint {what} {and_more(stored)}; it cannot run")
    for target, parts in pieces.items():
        _check_shapes(anatomy, skeleton, target, parts)
    return Destinations({target: tuple(parts) for target, parts in pieces.items()}, _scale_block(anatomy))


def running_name(anatomy: Anatomy, name: str) -> str:
    """Return what the running model calls the stored tensor ``name``; of an expert's, the parameter it is part of."""
    return _placed(anatomy, name, anatomy.roles[name])[0]


def _placed(anatomy: Anatomy, name: str, role: Role) -> tuple[str, Piece]:
    running = anatomy.family.in_memory
    spec = anatomy.tensors[name]
    if spec.dtype in _FP8:
        scale = name + _SCALE
        if scale not in anatomy.tensors:
            raise CheckpointError(
                f"{name} is stored as {spec.dtype} without {scale}; dequantise the checkpoint to run it"
            )
    elif spec.dtype in _PLAIN:
        scale = None
    else:
        raise CheckpointError(
            f"{name} is stored as {spec.dtype}, which moesurgeon cannot run; dequantise the checkpoint"
        )
    if role.kind not in ("expert", "fused", "rows"):
        if role.layer is None:
            return name, Piece(name, scale=scale)
        old, new = (layout.block.replace("{layer}", str(role.layer)) + "." for layout in (anatomy.layout, running))
        return (new + name.removeprefix(old) if name.startswith(old) else name), Piece(name, scale=scale)
    block = running.block.replace("{layer}", str(role.layer))
    if role.kind == "rows":
        for stored, held in zip(anatomy.layout.per_expert_rows, running.per_expert_rows, strict=True):
            if name == stored.replace("{block}", anatomy.layout.block).replace("{layer}", str(role.layer)):
                return held.replace("{block}", block), Piece(name, scale=scale)
    if role.suffix not in ("", ".weight"):
        raise CheckpointError(f"{name} is a part of experts that moesurgeon cannot run yet")
    prefix = running.fused.replace("{block}", block).replace("{layer}", str(role.layer))
    if role.kind == "fused":
        return prefix + running.projections[role.projection or ""], Piece(name, scale=scale)
    if role.projection == "down":
        return prefix + running.projections["down"], Piece(name, role.expert, scale=scale)
    wide = anatomy.expert_width
    rows = (0, wide) if role.projection == "gate" else (wide, 2 * wide)
    return prefix + running.projections["gate_up"], Piece(name, role.expert, rows, scale)


def _primary(skeleton: Skeleton, target: str, stored: Mapping[str, object]) -> str:
    """Return the name of the parameter that ``target`` is tied to, if it is stored under one name only."""
    first = skeleton.tied.get(target)
    return target if first is None or first in stored else first


def _check_shapes(anatomy: Anatomy, skeleton: Skeleton, target: str, pieces: list[Piece]) -> None:
    place = torch.empty(skeleton.targets[target].shape, device="meta")
    filled = 0
    for piece in pieces:
        shape = anatomy.tensors[piece.source].shape
        beyond = piece.expert is not None and (place.dim() != 3 or piece.expert >= place.shape[0])
        view = None if beyond else piece.view(place)
        if view is None or (tuple(view.shape) != shape and not _is_row(tuple(view.shape), shape)):
            raise CheckpointError(
                f"{piece.source} has shape {list(shape)}, but by config.json {target} has {list(place.shape)}; "
                "restore the one that is damaged"
            )
        filled += view.numel()
    if filled != place.numel():
        raise CheckpointError(f"{target} is stored in part only; a shard is missing or was cut")


def _is_row(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes differ only in sizes of one: a bias [E] as [1, E]."""
    return [size for size in one if size != 1] == [size for size in other if size != 1]


def _scale_block(anatomy: Anatomy) -> tuple[int, int]:
    quantisation = anatomy.config.get("quantization_config")
    block = quantisation.get("weight_block_size") if isinstance(quantisation, Mapping) else None
    if block is None:
        return 128, 128
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(f"config.json gives weight_block_size = {str(block)[:40]!r}, not two sizes; restore it")
    return block[0], block[1]
