"""What a block is healed with: its own inputs, and what its output should have been.

Teacher and student walk side by side. The student's block sees the student's input x; the target z is the
student's output y plus what the layer is short of, R = teacher's hidden state after the layer - student's. So
drift from earlier layers is corrected as well.

Legend: N tokens of text, H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation, replays
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Layer
from moesurgeon.errors import CheckpointError, OutputError
from moesurgeon.healing.room import Room


@dataclass(frozen=True)
class BlockData:
    """``inputs`` x and ``target`` z [N, H] of the student, and its routing before healing [N, K].

    ``importance`` [N]: what the squared error of a token counts, one on average (:func:`importance_of`). ``at_once``:
    tokens that the block is given at once, where there are more.
    """

    inputs: torch.Tensor
    target: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    importance: torch.Tensor
    at_once: int = BATCH_TOKENS

    def __len__(self) -> int:
        return len(self.inputs)

    def at(self, rows: torch.Tensor) -> BlockData:
        """Return these ``rows`` alone."""
        parts = (self.inputs, self.target, self.indices, self.weights, self.importance)
        inputs, target, indices, weights, importance = (part[rows.to(part.device)] for part in parts)
        return BlockData(inputs, target, indices, weights, importance, self.at_once)

    def chunks(
        self, device: torch.device, size: int | None = None
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield (rows, inputs, target) of ``at_once`` tokens, and of ``size`` at most, on ``device``."""
        size = self.at_once if size is None else min(size, self.at_once)
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield rows, self.inputs[rows].to(device), self.target[rows].to(device)


def block_data(
    layer: Layer, student: Stream, teacher: Stream, batches: Sequence[int], room: Room, name: str
) -> BlockData:
    """Run the student's layer on ``batches`` and return its block's data; the teacher has moved on already.

    ``name``: of the data in ``room``. Raises CheckpointError for states that are not finite, OutputError for a block
    that is not what healing takes it for.
    """
    count = sum(int(layer.walk.batches[number].is_text.sum()) for number in batches)
    device, dtype = student.source.supply.devices[layer.number + 1], student.source.placement.dtype
    wide, top_k = (count, student.anatomy.hidden), (count, student.anatomy.top_k)
    data = BlockData(
        room.empty(f"{name}.inputs", wide, dtype, device),
        room.empty(f"{name}.target", wide, dtype, device),
        torch.empty(top_k, dtype=torch.int64, device=device),
        torch.empty(top_k, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
        student.source.scratch.tokens,
    )
    start = 0
    for number in batches:
        seen: list[Observation] = []

        def keep(_block: MoeBlock, observation: Observation, seen: list[Observation] = seen) -> None:
            seen.append(observation)

        output = layer.forward(student, number, keep)
        (observation,) = seen
        text = layer.walk.batches[number].is_text.flatten().nonzero().squeeze(-1).to(output.device)
        target = wanted_of(layer, student, teacher, number, output, seen=observation, rows=text)
        if start == 0:
            refuse_strange(student, observation)
        rows = slice(start, start + len(text))
        data.inputs[rows] = observation.inputs[text].to(data.inputs.device)
        data.target[rows] = target.to(data.target.device)
        data.indices[rows] = observation.indices[text]
        data.weights[rows] = observation.weights[text].float()
        states = layer.walk.hidden[teacher].get(number).to(device).flatten(0, 1)[text.to(device)]
        data.importance[rows] = states.float().square().sum(-1)
        start = rows.stop
    assert start == count
    data.importance.copy_(importance_of(data.importance))
    return data


def importance_of(sizes: torch.Tensor) -> torch.Tensor:
    """Return what the squared error of each token counts, from the |h|^2 [N] of the layer's output h: 1 / |h|^2.

    What comes next divides by |h|, and some tokens, the first of a text above all, have thousands of times the |h|^2 of
    others (massive activations, Sun et al. 2024, arXiv:2402.17762): plain squares would be about little else. Scaled to
    a mean of one; a state near zero counts as one of a ten-thousandth of the mean |h|^2.
    """
    sizes = sizes.clamp(min=max(1e-30, 1e-4 * float(sizes.mean())))
    found = 1 / sizes
    return found / found.mean()


def wanted_of(
    layer: Layer,
    student: Stream,
    teacher: Stream | None,
    batch: int,
    output: torch.Tensor,
    *,
    seen: Observation,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Return the target z [n, H] of these ``rows`` of ``batch``, of which the layer made ``output`` [B, T, H].

    Without a ``teacher`` that is what the block gives. Raises CheckpointError for states that are not finite.
    """
    target = seen.result[rows]
    if teacher is not None:
        # Granite adds its blocks to the residual with a factor.
        factor = float(getattr(student.skeleton.model.config, "residual_multiplier", 1.0))
        wanted = layer.walk.hidden[teacher].get(batch).to(output.device)
        target = target + ((wanted - output) / factor).flatten(0, 1)[rows]
    if not (torch.isfinite(target).all() and torch.isfinite(seen.inputs).all()):
        raise CheckpointError(
            f"layer {layer.number}: hidden states are not finite: the weights hold NaN or infinities, or overflow "
            "in this --dtype; try float32"
        )
    return target


def refuse_strange(student: Stream, seen: Observation) -> None:
    """Raise OutputError if the block's experts do not compute what healing takes them to compute."""
    if not replays(student.blocks[seen.layer], seen):
        raise OutputError(
            f"layer {seen.layer}: its experts do not compute what healing takes them to compute; "
            f"moesurgeon's picture of {student.anatomy.family.title} is wrong here, please report it"
        )
