"""Layer distillation: Adam on one block alone, against the target that the teacher sets.

No backward pass through the model: the inputs of the block are data, so that memory is one layer with its
gradients and optimiser state, whatever the checkpoint's size. Routing is the block's own; its router is
trained along only on request.
"""

from __future__ import annotations

import numpy as np
import torch

from moesurgeon.engine.model import MoeBlock
from moesurgeon.healing.block import Values, error_of, is_of, output_of, own_values
from moesurgeon.healing.data import BlockData
from moesurgeon.healing.pace import Pace
from moesurgeon.progress import Advance


def distilled(
    block: MoeBlock,
    start: Values,
    train: BlockData,
    heldout: BlockData,
    pace: Pace,
    advance: Advance,
) -> tuple[dict[str, torch.Tensor], float]:
    """Return the best state on ``heldout`` by the names of ``block.module``, and its relative error there.

    ``start``: values in place of the block's own to begin with. Master weights are float32 whatever the block
    computes in. The loss is the squared error, relative to the target's mean square.
    """
    frozen = {**own_values(block), **start}
    masters = {
        name: tensor.float().clone().requires_grad_()
        for name, tensor in frozen.items()
        if is_of(block, name, router=pace.router)
    }
    # One kernel for all: nothing of the size of the parameters comes and goes.
    optimizer = torch.optim.Adam(masters.values(), lr=pace.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, pace.steps))
    scale = _mean_square(train)
    device = next(iter(masters.values())).device
    trained = sum(master.numel() for master in masters.values())
    down: torch.Tensor = block.experts.down_proj  # type: ignore[assignment]
    each = token_bytes(down.shape[-1], down.shape[-2], train.indices.shape[-1])
    piece = tokens_of_piece(trained, each, pace, train.at_once)
    rng = np.random.default_rng(pace.seed)
    best_error, best, waited = error_of(block, frozen, heldout), dict(start), 0
    for step in range(1, pace.steps + 1):
        rows = torch.from_numpy(rng.integers(0, len(train), pace.tokens_per_step))
        for some in rows.split(piece):
            loss = loss_of(block, {**frozen, **_rounded(masters, frozen)}, train, some, device) / scale
            (loss if len(some) == len(rows) else loss * (len(some) / len(rows))).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance(1)
        if step % pace.judge_every == 0 or step == pace.steps:
            with torch.no_grad():
                state = _rounded(masters, frozen)
            error = error_of(block, {**frozen, **state}, heldout)
            if error < best_error:
                best_error, waited = error, 0
                best = {**start, **{name: tensor.detach().clone() for name, tensor in state.items()}}
            else:
                waited += 1
            if waited >= pace.patience:
                advance(pace.steps - step)
                break
    return best, best_error


def token_bytes(wide: int, hidden: int, top_k: int) -> int:
    """Return what a training step keeps of a token: inputs, gate, up, activation and output by expert, in float32."""
    return (top_k + 1) * (5 * wide + 3 * hidden) * 4


def tokens_of_piece(trained: int, each: int, pace: Pace, at_once: int) -> int:
    """Return how many tokens of a step are computed together; the gradients of its pieces are added up.

    ``trained``: how many values; ``each``: bytes of a token. All, where that takes no more memory: a piece's gradient
    comes beside the sum so far.

    >>> tokens_of_piece(1000, 100, Pace(), 512), tokens_of_piece(1_000_000, 100, Pace(), 512)
    (512, 2048)
    """
    saved = (pace.tokens_per_step - at_once) * each
    return at_once if saved > 4 * trained else pace.tokens_per_step


def loss_of(block: MoeBlock, values: Values, data: BlockData, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the mean squared error of the block with ``values`` on ``rows`` of the data, by importance."""
    rows = rows.to(data.inputs.device)
    output = output_of(block, values, data.inputs[rows].to(device))
    wrong = (output.float() - data.target[rows].to(device).float()).square().mean(-1)
    return (wrong * data.importance[rows.to(data.importance.device)].to(device)).mean()


def rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: warm up over a twentieth, then decay to nothing.

    >>> [rate(step, 40) for step in (0, 1, 2, 21, 40)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else max(0.0, (steps - step) / max(1, steps - warm))


def _rounded(masters: Values, frozen: Values) -> dict[str, torch.Tensor]:
    """Return the master weights in the dtype that the block computes in."""
    return {name: master.to(frozen[name].dtype) for name, master in masters.items()}


def _mean_square(data: BlockData) -> float:
    total = 0.0
    for target, importance in zip(data.target.split(data.at_once), data.importance.split(data.at_once), strict=True):
        squares = target.float().square().sum(-1, dtype=torch.float64)
        total += float((squares * importance.to(squares.device)).sum())
    return total / data.target.numel()
