"""A sample of what a block is given and should give: on it, subsets of the block's experts are tried.

What the routed experts should give together is the target z less what the block adds to them (shared experts):
whichever of them are chosen, that part is the same.

Legend: N sampled tokens, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation
from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Layer
from moesurgeon.errors import OutputError
from moesurgeon.healing.data import importance_of, refuse_strange, wanted_of
from moesurgeon.profiling.collector import follows_rule
from moesurgeon.profiling.sample import Rows


@dataclass(frozen=True)
class Sample:
    """``inputs`` x [N, H] of the block, what its routed experts should give: ``wanted`` [N, H] in float32, and the
    router's ``logits`` [N, E]. ``weights`` [N]: what a token's squared error counts; ``square`` is the sum of w |z|^2,
    of which errors are shares."""

    inputs: torch.Tensor
    wanted: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    square: float

    def __len__(self) -> int:
        return len(self.inputs)


def take_sample(
    layer: Layer,
    stream: Stream,
    teacher: Stream | None,
    batches: Sequence[int],
    rows: Sequence[Rows],
) -> Sample:
    """Take ``stream`` through a mixture layer with ``batches`` and return these ``rows`` of each, as a sample.

    ``teacher`` (None: the stream itself) has moved on already. A token weighs what it does in healing
    (``healing.data.importance_of``). Raises CheckpointError for states that are not finite, OutputError for a block
    that is not what it is taken for.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    for number, mine in zip(batches, rows, strict=True):
        seen: list[Observation] = []

        def keep(_block: MoeBlock, observation: Observation, seen: list[Observation] = seen) -> None:
            seen.append(observation)

        output = layer.forward(stream, number, keep)
        (observation,) = seen
        at = torch.from_numpy(mine).to(output.device)
        target = wanted_of(layer, stream, teacher, number, output, seen=observation, rows=at).float()
        if not parts:
            _refuse_other_rule(stream, observation)
        beside = observation.result[at].float() - observation.output[at].float()
        states = output if teacher is None else layer.walk.hidden[teacher].get(number).to(output.device)
        sizes = states.flatten(0, 1)[at].float().square().sum(-1)
        parts.append(
            (observation.inputs[at], target - beside, observation.logits[at].float(), target.square().sum(-1), sizes)
        )
        layer.walk.hidden[stream].put(number, output, layer=layer.number)
    inputs, wanted, logits, squares, sizes = (torch.cat(part) for part in zip(*parts, strict=True))
    weights = importance_of(sizes)
    return Sample(inputs, wanted, logits, weights, float((squares * weights).sum(dtype=torch.float64)))


def _refuse_other_rule(stream: Stream, seen: Observation) -> None:
    refuse_strange(stream, seen)
    routing = routing_of(stream.anatomy)
    if not follows_rule(routing, stream.blocks[seen.layer], seen):
        raise OutputError(
            f"layer {seen.layer}: the weights are not what the {stream.anatomy.family.title} rule makes of the "
            f"router's logits ({routing}); please report it"
        )
