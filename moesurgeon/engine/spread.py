"""A model over several accelerators: which layer goes where, as accelerate divides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_max_memory

from moesurgeon.engine.skeleton import Skeleton
from moesurgeon.engine.supply import groups_of
from moesurgeon.errors import UsageError

Room = Mapping[int | str, int]


def devices_for(skeleton: Skeleton, kind: str, working: int, room: Room | None = None) -> Sequence[torch.device]:
    """Return the device of each group of ``skeleton``, all of this ``kind`` ("cuda").

    ``working``: bytes that a device needs beside its weights. ``room``: bytes by device number, by default
    what accelerate finds free. Raises UsageError if the model does not fit on all of them together.
    """
    free = room or {number: size for number, size in get_max_memory().items() if isinstance(number, int)}
    left = {number: max(0, size - working) for number, size in free.items()}
    places = infer_auto_device_map(
        skeleton.model,
        max_memory={**left, "cpu": 0},
        no_split_module_classes=list(skeleton.model._no_split_modules or ()),
    )
    found: list[torch.device] = []
    for names in groups_of(skeleton):
        wanted = {_place_of(name, places) for name in names}
        numbers = [place for place in wanted if isinstance(place, int)]
        if len(numbers) < len(wanted):
            raise UsageError(
                f"the weights do not fit on the {len(free)} devices together; --device {kind} reads them layer by layer"
            )
        # A group is never divided; where accelerate would, the tail for one, it goes to the last of them.
        found.append(torch.device(kind, max(numbers)))
    return found


def _place_of(name: str, places: Mapping[str, int | str | torch.device]) -> int | str | torch.device:
    """Return where the module goes that ``name`` is in."""
    path = name
    while path not in places and path:
        path = path.rpartition(".")[0]
    return places[path]
