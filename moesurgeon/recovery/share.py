"""Several processes train one model: each has rows of every batch, and what they make of them adds up to the whole.

What is trained is small, so that every process has all of it and takes the same steps; of a step only the gradients are
exchanged, in one sum. They are not averaged over processes, as DistributedDataParallel would: the terms are means over
tokens, and rows differ in length. Each process has the part of a mean that its own tokens make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from moesurgeon.engine.batches import Batch, to_batch
from moesurgeon.engine.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """The rows ``batch`` of a step's batch. ``text``: what share of its tokens they have; ``predicted``: of those that
    are predicted.

    A process without rows has one that counts for nothing: it has to be there when numbers are exchanged.
    """

    batch: Batch
    text: float = 1.0
    predicted: float = 1.0
    ranks: Ranks = field(default_factory=Ranks)

    def summed(self, mine: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes of what each has made of its rows; it has no gradient."""
        if self.ranks.size == 1:
            return mine.detach()
        return self.ranks.summed(mine.detach() * float(self.text > 0))


def share_of(batch: Batch, ranks: Ranks) -> Share:
    """Return this process's share of the whole ``batch``: neighbouring rows, as many as the others' but for one."""
    if ranks.size == 1:
        return Share(batch)
    count = len(batch.windows)
    rows = batch.windows[count * ranks.number // ranks.size : count * (ranks.number + 1) // ranks.size]
    device = batch.tokens.device
    if not rows:
        return Share(to_batch(batch.windows[:1], device), 0.0, 0.0, ranks)
    mine = to_batch(rows, device)
    predicted = batch.text_tokens - count
    return Share(
        mine,
        mine.text_tokens / batch.text_tokens,
        (mine.text_tokens - len(rows)) / predicted if predicted else 0.0,
        ranks,
    )


def add_up(weights: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Make the gradients of ``weights`` the sums over all processes."""
    if ranks.size == 1:
        return
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    for weight, gradient in zip(weights, summed_each(gradients, ranks), strict=True):
        weight.grad = gradient


def summed_each(tensors: Iterable[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """Return the sums over all processes of each of ``tensors``, in one exchange."""
    each = list(tensors)
    if ranks.size == 1:
        return each
    sums = ranks.summed(torch.cat([tensor.flatten() for tensor in each]))
    return [part.view_as(tensor) for part, tensor in zip(sums.split([t.numel() for t in each]), each, strict=True)]
