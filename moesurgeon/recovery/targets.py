"""What recovery trains: routers and experts of a running model, by the parameters that hold them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from moesurgeon.engine.loading import DTYPES
from moesurgeon.engine.model import MoeBlock, moe_blocks, shared_experts
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.surgery.anatomy import Anatomy

Adapt = Literal["routers", "full-routers", "experts", "experts-all"]
"""``routers``: low-rank adapters on them; ``full-routers``: their weights themselves; ``experts``: low-rank adapters
on the down projections of those that are chosen; ``experts-all``: on all matrices of all experts, shared ones too."""
Kind = Literal["lora", "adalora"]
"""Of the routers' adapters: all of one rank, or ranks that are dealt out among the routers while they are trained."""
Part = Literal["routers", "experts"]
PARTS: tuple[Part, ...] = ("routers", "experts")

WRITABLE = ("BF16", "F16", "F32")
"""The dtypes, as safetensors spells them, in which something trained can be written."""
Experts = Mapping[int, frozenset[int]]
"""By layer, the experts that are trained, of those that are chosen; shared ones are not, then."""


@dataclass(frozen=True)
class Target:
    """The parameter ``parameter`` of ``module``, which the running model calls ``name``.

    ``low_rank``: it gets an adapter; else it is trained itself.
    """

    name: str
    layer: int
    part: Part
    module: nn.Module
    parameter: str
    low_rank: bool

    @property
    def weight(self) -> nn.Parameter:
        found: nn.Parameter = getattr(self.module, self.parameter)
        return found


def check_adapt(adapt: Sequence[str], kind: Kind = "lora") -> None:
    """Raise UsageError for names that say nothing, or two things at once, or cannot be adapted in this way."""
    if not adapt:
        raise UsageError("nothing is named to train; give --adapt routers, full-routers, experts or experts-all")
    known = Adapt.__args__  # type: ignore[attr-defined]
    for name in adapt:
        if name not in known:
            raise UsageError(f"--adapt {name} is not one of {', '.join(known)}")
    for pair in (("routers", "full-routers"), ("experts", "experts-all")):
        if set(pair) <= set(adapt):
            raise UsageError(f"--adapt {pair[0]} and --adapt {pair[1]} exclude each other; give one of them")
    if kind == "adalora" and set(adapt) != {"routers"}:
        raise UsageError(
            "--adapter adalora is for --adapt routers alone: ranks are dealt out among routers, and peft has no such "
            "adapter for experts; train the experts in a second recover"
        )


def parts_of(adapt: Collection[str]) -> tuple[Part, ...]:
    """Return which parts of the model ``adapt`` trains.

    >>> parts_of(("experts-all", "full-routers"))
    ('routers', 'experts')
    """
    return tuple(part for part in PARTS if any(part in name for name in adapt))


def targets_of(model: nn.Module, anatomy: Anatomy, adapt: Sequence[Adapt]) -> list[Target]:
    """Return the parameters of ``model`` that ``adapt`` names, routers first.

    Raises CheckpointError where a family holds its experts otherwise than as one parameter [E, .., ..].
    """
    check_adapt(adapt)
    blocks = moe_blocks(model, anatomy)
    found = []
    if "routers" in parts_of(adapt):
        for block in blocks:
            name = f"{block.name}.{anatomy.family.router_module}.weight"
            found.append(Target(name, block.layer, "routers", block.router, "weight", "routers" in adapt))
    if "experts" in parts_of(adapt):
        for block in blocks:
            for parameter in ("down_proj", "gate_up_proj") if "experts-all" in adapt else ("down_proj",):
                held = getattr(block.experts, parameter, None)
                if not isinstance(held, nn.Parameter) or held.dim() != 3 or len(held) != anatomy.experts:
                    raise CheckpointError(
                        f"the experts of {anatomy.family.title} are not held as one {parameter}, so they cannot be "
                        "adapted; train the routers alone with --adapt routers"
                    )
                name = f"{block.name}.{anatomy.family.experts_module}.{parameter}"
                found.append(Target(name, block.layer, "experts", block.experts, parameter, True))
            if "experts-all" in adapt:
                found += _shared(block)
    return found


def _shared(block: MoeBlock) -> list[Target]:
    """Return the matrices of the experts that every token goes to."""
    shared = shared_experts(block)
    if shared is None:
        return []
    return [
        Target(f"{block.name}.{shared[0]}.{name}.weight", block.layer, "experts", module, "weight", True)
        for name, module in shared[1].named_modules()
        if isinstance(module, nn.Linear)
    ]


def refuse_unwritable(student: Stream, targets: Sequence[Target]) -> None:
    """Raise CheckpointError now if a trained value could not be stored as the checkpoint stores it."""
    for target in targets:
        for piece in student.stored_parts(target.name):
            dtype = student.anatomy.tensors[piece.source].dtype
            if dtype not in WRITABLE or piece.scale is not None:
                raise CheckpointError(
                    f"{piece.source} is stored as {dtype}; only {', '.join(WRITABLE)} can be trained: convert it"
                )


def as_stored(student: Stream, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return what writing ``weight`` under the running name ``name`` makes of it, in the dtype it is stored in."""
    dtypes = {DTYPES[student.anatomy.tensors[piece.source].dtype] for piece in student.stored_parts(name)}
    rounded = student.as_stored(name, weight.cpu())
    return rounded.to(dtypes.pop()) if len(dtypes) == 1 else rounded
