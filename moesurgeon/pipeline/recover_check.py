"""What of a recovery cannot be, told from headers before any text is read: for the command, and for recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgeon import launched
from moesurgeon.checkpoint.staging import refuse_place
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.pipeline.options import Text
from moesurgeon.recovery.adalora import refuse_ranks
from moesurgeon.recovery.log import check_log
from moesurgeon.recovery.objective import refuse_without_gradient
from moesurgeon.recovery.targets import WRITABLE, check_adapt, parts_of
from moesurgeon.surgery.anatomy import Anatomy

if TYPE_CHECKING:
    from moesurgeon.pipeline.recover import RecoverSpec


def check_training(anatomy: Anatomy, spec: RecoverSpec, text: Text) -> None:
    """Raise UsageError or CheckpointError for a training of a checkpoint with ``anatomy`` that cannot be."""
    if launched.divides_weights():
        raise UsageError(
            "recover does not divide the weights among processes (FSDP, DeepSpeed); launch it without that: each "
            "process holds the checkpoint, and reads it layer by layer where it does not fit"
        )
    check_adapt(spec.adapt, spec.adapter)
    if spec.adapter == "adalora":
        refuse_ranks(anatomy, spec.schedule.rank, spec.schedule.steps)
    check_log(spec.log, spec.tensorboard)
    if spec.cache is not None:
        refuse_place(spec.cache, "--cache")
    refuse_without_gradient(anatomy, spec.losses, spec.adapt)
    if spec.changed is not None and "experts" not in parts_of(spec.adapt):
        raise UsageError("--changed chooses among experts, and none are trained; add --adapt experts")
    _refuse_unwritable(anatomy, spec)
    if text.split in ("validation", "all") and not spec.validation:
        raise UsageError(
            f"--split {text.split} would train on the text that judges the result; use train or calibration"
        )


def _refuse_unwritable(anatomy: Anatomy, spec: RecoverSpec) -> None:
    """Raise CheckpointError now if what is trained could not be stored as the checkpoint stores it."""
    trained: list[str] = []
    if "routers" in parts_of(spec.adapt):
        trained += [anatomy.router_weight(layer) for layer in anatomy.moe_layers]
    if "experts" in parts_of(spec.adapt):
        kinds = ("expert", "fused", "shared") if "experts-all" in spec.adapt else ("expert", "fused")
        layers = set(anatomy.moe_layers)
        # Scales and biases lie beside the matrices; those are told apart by their shape.
        named = [(name, role) for name, role in anatomy.of_kind(*kinds) if role.layer in layers]
        trained += [name for name, _role in named if len(anatomy.tensors[name].shape) > 1]
    for name in trained:
        dtype = anatomy.tensors[name].dtype
        if dtype not in WRITABLE:
            raise CheckpointError(f"{name} is stored as {dtype}; only {', '.join(WRITABLE)} can be trained: convert it")
