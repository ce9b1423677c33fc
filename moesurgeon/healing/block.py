"""One block run on its own, with values of its parameters that are not in the model.

The block is the stock module, with its own routing, shared experts and gates; only the loop over its routed
experts is replaced. Tokens are sorted by expert once, and the parameters are split into experts once: the
gradient of the stock loop's indexing is as large as all experts, for each of them.

Legend: T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from moesurgeon.engine.model import MoeBlock, shared_experts
from moesurgeon.healing.data import BlockData
from moesurgeon.healing.exact import sum_of_squares

ROWS = 64
"""What an expert's tokens are rounded up to where every number of them costs a kernel."""

Values = Mapping[str, torch.Tensor]
"""By the names of the block's module."""


def own_values(block: MoeBlock) -> dict[str, torch.Tensor]:
    """Return the block's parameters and buffers as they are."""
    return {name: tensor.detach() for name, tensor in block.module.state_dict().items()}


def output_of(block: MoeBlock, values: Values, inputs_TH: torch.Tensor) -> torch.Tensor:
    """Return what the block with ``values`` makes of tokens [T, H]."""
    with _sorted_by_expert(block.experts):
        result = functional_call(block.module, dict(values), (inputs_TH[None],))
    result = result[0] if isinstance(result, tuple) else result
    output: torch.Tensor = result.reshape(-1, result.shape[-1])
    return output


@torch.no_grad()
def error_of(block: MoeBlock, values: Values, data: BlockData) -> float:
    """Return the squared error of the block with ``values``, as a share of the target's square, by importance."""
    wrong = norm = 0.0
    for rows, inputs, target in data.chunks(_device_of(block)):
        root = data.importance[rows, None].sqrt().to(inputs.device)
        output = output_of(block, values, inputs).float()
        wrong += sum_of_squares((output - target.float()) * root)
        norm += sum_of_squares(target.float() * root)
    return wrong / norm if norm else float("nan")


@torch.no_grad()
def missing_of(block: MoeBlock, values: Values, data: BlockData, into: torch.Tensor) -> torch.Tensor:
    """Write what the block with ``values`` is short of, R = z - y [N, H], to ``into``."""
    for rows, inputs, target in data.chunks(_device_of(block)):
        into[rows] = (target.float() - output_of(block, values, inputs).float()).to(into.device)
    return into


def experts_name(block: MoeBlock) -> str:
    return next(name for name, module in block.module.named_modules() if module is block.experts)


def is_of(block: MoeBlock, name: str, *, router: bool) -> bool:
    """Whether the parameter ``name`` is of the experts, shared ones included; ``router``: or of what gates them."""
    if name not in dict(block.module.named_parameters()):
        return False
    shared = shared_experts(block)
    experts = [experts_name(block), *([shared[0]] if shared else [])]
    return any(name.startswith(f"{each}.") for each in experts) or router


def _device_of(block: MoeBlock) -> torch.device:
    device: torch.device = next(block.experts.parameters()).device
    return device


@contextmanager
def _sorted_by_expert(experts: nn.Module) -> Iterator[None]:
    """Compute the experts one after the other on the tokens that are theirs."""
    own = vars(experts).get("forward")
    experts.forward = _forward(experts)
    try:
        yield
    finally:
        if own is None:
            del experts.forward
        else:
            experts.forward = own


def _forward(experts: Any) -> Callable[..., torch.Tensor]:
    def forward(inputs_TH: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        gate_ups, downs = experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0)
        flat = indices_TK.flatten()
        order = flat.argsort(stable=True)
        of_expert = torch.bincount(flat, minlength=len(downs))
        token, weights = order // indices_TK.shape[1], weights_TK.flatten()[order, None]
        if _compiles_by_shape(inputs_TH):
            of_expert, token, weights = _padded(of_expert, token, weights)
        counts = of_expert.tolist()
        parts = zip(gate_ups, downs, inputs_TH[token].split(counts), weights.split(counts), strict=True)
        outputs = []
        for gate_up, down, mine, weight in parts:
            if len(mine):
                gate, up = F.linear(mine, gate_up).chunk(2, dim=-1)
                outputs.append((F.linear(experts.act_fn(gate) * up, down) * weight).to(inputs_TH.dtype))
        return torch.zeros_like(inputs_TH).index_add(0, token, torch.cat(outputs))

    return forward


def _compiles_by_shape(inputs: torch.Tensor) -> bool:
    """Whether a kernel is compiled for every number of rows, which takes longer than to run it."""
    return inputs.device.type == "cpu" and inputs.dtype in (torch.bfloat16, torch.float16)


def _padded(of_expert: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the same with an expert's first token again, of weight zero, so that each has a multiple of ``ROWS``.

    One of its own: another's might overflow in it, and infinity times zero is not zero.
    """
    rounded = (of_expert + ROWS - 1) // ROWS * ROWS
    added = rounded - of_expert
    at = torch.arange(len(token)) + (added.cumsum(0) - added).repeat_interleave(of_expert)
    firsts = (of_expert.cumsum(0) - of_expert).clamp(max=len(token) - 1)  # of an expert without tokens none is taken
    return (
        rounded,
        token[firsts].repeat_interleave(rounded).index_copy(0, at, token),
        weights.new_zeros(int(rounded.sum()), 1).index_copy(0, at, weights),
    )
