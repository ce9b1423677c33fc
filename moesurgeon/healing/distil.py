"""Layer distillation: Adam on one block alone, against the target that the teacher sets.

No backward pass through the model: the inputs of the block are data, so that memory is one layer with its
gradients and optimiser state, whatever the checkpoint's size. Routing is the block's own; its router is
trained along only on request.

Legend: N tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.func import functional_call

from moesurgeon.engine.model import MoeBlock
from moesurgeon.healing.data import BlockData
from moesurgeon.healing.pace import Pace
from moesurgeon.progress import Advance

_CHUNK = 8192  # tokens whose outputs are held at once while judging


def distilled(
    block: MoeBlock,
    start: Mapping[str, torch.Tensor],
    train: BlockData,
    heldout: BlockData,
    pace: Pace,
    advance: Advance,
) -> tuple[Mapping[str, torch.Tensor], float]:
    """Return the best state on ``heldout`` by the names of ``block.module``, and its relative error there.

    ``start``: values in place of the block's own to begin with. Master weights are float32 whatever the block
    computes in.
    """
    frozen = {name: tensor.detach() for name, tensor in block.module.state_dict().items()} | dict(start)
    names = [name for name in frozen if _is_trained(block, name, pace)]
    masters = {name: frozen[name].float().clone().requires_grad_() for name in names}
    optimizer = torch.optim.Adam(masters.values(), lr=pace.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, pace.steps))
    scale = train.target.float().square().mean()
    rng = np.random.default_rng(pace.seed)
    best_error, best, waited = error_of(block, frozen, heldout), None, 0
    for step in range(1, pace.steps + 1):
        rows = torch.from_numpy(rng.integers(0, len(train), pace.tokens_per_step)).to(train.inputs.device)
        values = {**frozen, **{name: master.to(frozen[name].dtype) for name, master in masters.items()}}
        output = _output(block, values, train.inputs[rows])
        loss = (output.float() - train.target[rows].float()).square().mean() / scale
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance(1)
        if step % pace.judge_every == 0 or step == pace.steps:
            state = {name: master.detach().to(frozen[name].dtype) for name, master in masters.items()}
            error = error_of(block, {**frozen, **state}, heldout)
            if error < best_error:
                best_error, best, waited = error, {name: tensor.clone() for name, tensor in state.items()}, 0
            else:
                waited += 1
            if waited >= pace.patience:
                advance(pace.steps - step)
                break
    return {**start, **(best or {})}, best_error


@torch.no_grad()
def error_of(block: MoeBlock, values: Mapping[str, torch.Tensor], data: BlockData) -> float:
    """Return the squared error of the block with ``values`` in place of its own, as a share of the target's square."""
    wrong = norm = 0.0
    for start in range(0, len(data), _CHUNK):
        target = data.target[start : start + _CHUNK].double()
        output = _output(block, values, data.inputs[start : start + _CHUNK])
        wrong += float((output.double() - target).square().sum())
        norm += float(target.square().sum())
    return wrong / norm


def _output(block: MoeBlock, values: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Return what the block makes of tokens [N, H]."""
    result = functional_call(block.module, dict(values), (inputs[None],))
    result = result[0] if isinstance(result, tuple) else result
    output: torch.Tensor = result.reshape(-1, result.shape[-1])
    return output


def _is_trained(block: MoeBlock, name: str, pace: Pace) -> bool:
    """Whether the parameter ``name`` of the block takes part: experts and shared experts, the router on request."""
    parameters = dict(block.module.named_parameters())
    if name not in parameters:
        return False
    owner = block.module.get_submodule(name.rpartition(".")[0])
    if owner is block.router:
        return pace.router
    return owner is block.experts or "shared" in name


def _rate(step: int, steps: int) -> float:
    """Warm up over a twentieth, then decay to nothing."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else max(0.0, (steps - step) / max(1, steps - warm))
