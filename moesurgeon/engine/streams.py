"""Streams: a checkpoint with an overlay, on its way through the layers beside others of the same checkpoint.

All streams of a :class:`Source` share each layer that was read. What an overlay changes, and only that, a
stream has of its own, for as long as its layer is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Self

import torch
from transformers import PreTrainedModel

from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.engine.destinations import Destinations, Piece, destinations_of
from moesurgeon.engine.device import Placement
from moesurgeon.engine.loading import DTYPES, Loader, piece_values
from moesurgeon.engine.masking import masked
from moesurgeon.engine.model import MoeBlock, moe_blocks
from moesurgeon.engine.scratch import Scratch
from moesurgeon.engine.skeleton import Skeleton, build_skeleton
from moesurgeon.engine.supply import Supply, Tensors, groups_of
from moesurgeon.errors import CheckpointError
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.edits import Output, Part, Slice
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.shards import bytes_of


class Source:
    """A checkpoint whose layers are read for all of its streams. Close it, or use it as a context.

    All its weights may be in memory unless ``supply.allow`` says less; ``scratch`` is how much may be computed at
    once (``engine.budget``).
    """

    def __init__(
        self,
        anatomy: Anatomy,
        placement: Placement,
        skeleton: Skeleton,
        destinations: Destinations,
        files: tuple[Checkpoint, ShardReader] | None,
    ) -> None:
        self.anatomy = anatomy
        self.placement = placement
        self.skeleton = skeleton
        self.destinations = destinations
        self.scratch = Scratch()
        self._files = files
        self._loader = Loader(*files, destinations) if files else None
        self.supply = Supply(skeleton, self._loader.fill if self._loader else _nothing, placement.device)

    @classmethod
    def of_checkpoint(
        cls, checkpoint: Checkpoint, anatomy: Anatomy, placement: Placement, experts: str | None = None
    ) -> Source:
        """The weights on disk; CheckpointError for what cannot be run. ``experts``: see ``engine.skeleton``."""
        skeleton = build_skeleton(anatomy, placement.dtype, placement.device, experts)
        destinations = destinations_of(anatomy, skeleton)
        return cls(anatomy, placement, skeleton, destinations, (checkpoint, ShardReader(checkpoint)))

    @classmethod
    def of_model(cls, model: PreTrainedModel, anatomy: Anatomy) -> Source:
        """The weights that ``model`` holds, with whatever was done to its modules."""
        skeleton = Skeleton(model, {}, {}, anatomy.family.layer, anatomy.layers)
        return cls(anatomy, Placement(model.device, model.dtype), skeleton, Destinations({}, (1, 1)), None)

    @property
    def holds_a_model(self) -> bool:
        return self._files is None

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return these targets alone, in memory of their own; not while a walk reads."""
        assert self._loader is not None
        targets = {name: self.skeleton.targets[name] for name in names}
        found = {
            name: torch.empty(target.shape, dtype=target.dtype, device=self.placement.device)
            for name, target in targets.items()
        }
        self._loader.fill(found)
        return found

    def stored_bytes(self, names: Sequence[str]) -> int:
        """Return how many bytes of the checkpoint these targets are read from."""
        pieces = (piece for name in names for piece in self.destinations.pieces[name])
        return sum(
            self.anatomy.tensors[source].nbytes for piece in pieces for source in (piece.source, piece.scale) if source
        )

    def bytes_of(self, part: Part) -> bytes:
        """Return the bytes of a planned tensor's part."""
        assert self._files is not None
        return bytes_of(part, *self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._files:
            self._files[1].__exit__(kind, error, trace)

    @property
    def layers(self) -> int:
        return self.skeleton.layers


@dataclass(frozen=True, slots=True)
class Delta:
    """A low-rank change of a parameter: ``scale`` x up @ down, with down [.., R, in] and up [.., out, R]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``weight`` with the change, rounded once to its dtype."""
        change = self.up.to(weight.device).float() @ self.down.to(weight.device).float()
        return (weight.float() + self.scale * change).to(weight.dtype)


@dataclass(kw_only=True)
class Overlay:
    """What a stream changes of its checkpoint.

    ``plan``: edits that are not written yet (another top-k and pruned experts are such plans). ``masked``:
    by layer, experts that its router cannot choose. ``tensors`` and ``deltas``: by the running model's
    names (``engine.destinations.running_name``), values in place of, and low-rank changes added to, its own;
    they may be changed while the stream walks and count from then on. ``changes``: functions of its own, for what
    is not to be in memory for all layers at once.
    """

    plan: EditPlan | None = None
    masked: Mapping[int, frozenset[int]] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)


class Stream:
    """``source`` with ``overlay``; ``anatomy`` is that of the result. ``name`` is for messages.

    ``skeleton``: modules to run in, with whatever was done to them, in place of new ones; no plan, then.
    """

    def __init__(
        self, source: Source, overlay: Overlay | None = None, name: str = "", *, skeleton: Skeleton | None = None
    ) -> None:
        self.source = source
        self.overlay = overlay or Overlay()
        self.name = name
        plan = self.overlay.plan
        self.anatomy = source.anatomy if plan is None else plan.result(source.anatomy)
        if self.anatomy.layers != source.layers:
            raise CheckpointError("a plan that changes the number of layers cannot walk beside its checkpoint")
        changes = plan or self.overlay.tensors or self.overlay.deltas
        assert not (changes and source.holds_a_model), "a model's weights are changed in the model itself"
        assert not (plan and skeleton), "a plan can have other modules"
        if source.holds_a_model:
            skeleton = source.skeleton
        self.skeleton = skeleton or build_skeleton(self.anatomy, source.placement.dtype, source.placement.device)
        self._destinations = source.destinations if plan is None else destinations_of(self.anatomy, self.skeleton)
        self._groups = groups_of(self.skeleton)

    @cached_property
    def blocks(self) -> Mapping[int, MoeBlock]:
        """The mixture-of-experts blocks by layer."""
        return {block.layer: block for block in moe_blocks(self.skeleton.model, self.anatomy)}

    @property
    def copied_bytes(self) -> int:
        """The bytes of a group that the plan makes anew, which are there beside what was read: the most of all."""
        targets = self.skeleton.targets
        return max(sum(targets[name].nbytes for name in names if not self._is_shared(name)) for names in self._groups)

    @contextmanager
    def bound(self, group: int, read: Tensors) -> Iterator[None]:
        """Inside the context the modules of ``group`` (0: embedding, then layers, then tail) hold their weights.

        ``read``: the source's weights of the group.
        """
        names = self._groups[group]
        try:
            for name in names:
                self.rebind(name, read)
            with ExitStack() as stack:
                layer = group - 1
                if experts := self.overlay.masked.get(layer):
                    stack.enter_context(masked(self.blocks[layer], experts, self.anatomy.experts))
                yield
        finally:
            self.skeleton.clear(names)

    def rebind(self, name: str, read: Tensors) -> None:
        """Give the modules what the overlay now says of ``name``."""
        tensor = self.overlay.tensors.get(name)
        if tensor is None:
            tensor = self._value(name, read)
        else:
            target = self.skeleton.targets[name]
            assert tuple(tensor.shape) == target.shape, f"{name} is replaced by another shape"
            tensor = tensor.to(_device_of(read, self.source), target.dtype)
        if delta := self.overlay.deltas.get(name):
            tensor = delta.added_to(tensor)
        if change := self.overlay.changes.get(name):
            tensor = change(tensor).to(tensor.device, tensor.dtype)
        self.skeleton.put(name, tensor)

    @property
    def pieces(self) -> Mapping[str, tuple[Piece, ...]]:
        """By running name the stored tensors that it is put together from."""
        return self._destinations.pieces

    def stored_parts(self, name: str) -> tuple[Piece, ...]:
        """Return which stored tensors the running name ``name`` is put together from."""
        return self._destinations.pieces[name]

    def stored_value(self, piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
        """Return what ``piece`` holds of a running tensor, in the dtype and shape that it is stored in."""
        spec = self.anatomy.tensors[piece.source]
        return piece.view(tensor).reshape(spec.shape).to(DTYPES[spec.dtype]).contiguous()

    def as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` with the rounding that writing it under the running name ``name`` would bring."""
        rounded = torch.empty_like(tensor)
        for piece in self.stored_parts(name):
            view = piece.view(rounded)
            view.copy_(self.stored_value(piece, tensor).view(view.shape))
        return rounded

    def _value(self, name: str, read: Tensors) -> torch.Tensor:
        """Return the source's tensor where the plan leaves it as it is, else what the plan makes of it."""
        if self._is_shared(name):
            return read[name]
        target = self.skeleton.targets[name]
        made = torch.empty(target.shape, dtype=target.dtype, device=_device_of(read, self.source))
        assert self.overlay.plan is not None
        for piece in self._destinations.pieces[name]:
            self._assemble(self.overlay.plan.outputs[piece.source], piece.view(made).view(-1), read)
        return made

    def _is_shared(self, name: str) -> bool:
        plan = self.overlay.plan
        if plan is None:
            return True
        theirs, mine = self.source.destinations.pieces.get(name), self._destinations.pieces[name]
        if theirs is None or self.source.skeleton.targets[name] != self.skeleton.targets[name]:
            return False
        stored = self.source.anatomy.tensors
        whole = [(piece.expert, piece.rows, (Slice(piece.source, 0, stored[piece.source].nbytes),)) for piece in theirs]
        return whole == [(piece.expert, piece.rows, plan.outputs[piece.source].parts) for piece in mine]

    def _assemble(self, output: Output, place: torch.Tensor, read: Tensors) -> None:
        """Fill ``place`` (flat) with the values of ``output``: from what was read, where it is of this group."""
        dtype = DTYPES[output.spec.dtype]
        position = 0
        for part in output.parts:
            count = part.length // dtype.itemsize
            home = self.source.destinations.target_of.get(part.tensor) if isinstance(part, Slice) else None
            if isinstance(part, Slice) and home is not None and home[0] in read:
                start = part.start // dtype.itemsize
                values = home[1].view(read[home[0]]).view(-1)[start : start + count]
            elif output.spec.dtype.startswith("F8"):
                raise CheckpointError(f"{output.spec.name} would be made from FP8 weights without their scales")
            else:
                values = piece_values(output.spec.dtype, self.source.bytes_of(part), (count,))
            place[position : position + count].copy_(values)
            position += count


def _device_of(read: Tensors, source: Source) -> torch.device:
    """Return where the weights of a group are."""
    return next((tensor.device for tensor in read.values()), source.placement.device)


def _nothing(_tensors: Tensors, _stop: object) -> None:
    """Fill nothing: the model has its weights."""
