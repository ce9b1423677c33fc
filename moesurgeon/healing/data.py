"""What a block is healed with: its own inputs, and what its output should have been.

Teacher and student walk side by side. The student's block sees the student's input x; the target z is the
student's output y plus what the layer is short of, R = teacher's hidden state after the layer - student's. So
drift from earlier layers is corrected as well.

Legend: N tokens of text, H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Layer


@dataclass(frozen=True)
class BlockData:
    """``inputs`` x and ``target`` z [N, H], ``output`` y [N, H] of the student before healing; its routing [N, K]."""

    inputs: torch.Tensor
    target: torch.Tensor
    output: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def block_data(layer: Layer, student: Stream, teacher: Stream, batches: Iterable[int]) -> BlockData:
    """Run the student's layer on ``batches`` and return its block's data; the teacher has moved on already."""
    # Granite adds its blocks to the residual with a factor.
    factor = float(getattr(student.skeleton.model.config, "residual_multiplier", 1.0))
    parts: list[tuple[torch.Tensor, ...]] = []
    for number in batches:
        seen: list[Observation] = []

        def keep(_block: MoeBlock, observation: Observation, seen: list[Observation] = seen) -> None:
            seen.append(observation)

        output = layer.forward(student, number, keep)
        wanted = layer.walk.hidden[teacher].get(number).to(output.device)
        rows = layer.walk.batches[number].is_text.flatten().nonzero().squeeze(-1).to(output.device)
        missing = ((wanted - output) / factor).flatten(0, 1)[rows]
        (observation,) = seen
        result = observation.result[rows]
        parts.append(
            (observation.inputs[rows], result + missing, result, observation.indices[rows], observation.weights[rows])
        )
    return BlockData(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def relative_error(output: torch.Tensor, target: torch.Tensor) -> float:
    """Return the squared error as a share of the target's square."""
    return float((output - target).double().square().sum() / target.double().square().sum())
