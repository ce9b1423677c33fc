"""Length, pace and economy of a recovery."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from moesurgeon.engine.batches import Batch, rows_for, to_batch
from moesurgeon.traces.windows import Corpus, Window

_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and pace of the training. ``candidates``: experts that get a gradient; None: all.

    Whole routers are trained at a tenth of ``learning_rate``. ``expert_rate``: peak learning rate of what is trained of
    experts (None: ``learning_rate``). ``warmup``: share of
    the steps in which rates rise, before they fall with a cosine to a tenth. ``clip``: the largest norm of the
    gradient. ``patience``: judgements without a better state after which it ends (None: never before the last step).
    ``min_share``: a state in which an expert has surely fallen below this part of an even share of the choices is not
    taken for the best (0: it may be; see ``recovery.floor``). ``capacity``: factor beyond which choices are dropped
    while training (None: nothing is). ``recompute``: layers run again in the backward pass, for memory. The bounds are
    for recipes; the command line has its own.
    """

    steps: Annotated[int, Field(ge=1)] = 1000
    tokens_per_step: Annotated[int, Field(ge=8)] = 2048
    learning_rate: _Rate = 1e-3
    expert_rate: _Rate | None = None
    rank: Annotated[int, Field(ge=1)] = 32
    judge_every: Annotated[int, Field(ge=1)] = 100
    patience: Annotated[int, Field(ge=1)] | None = None
    min_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    clip: _Factor = 1.0
    candidates: Annotated[int, Field(ge=1)] | None = None
    capacity: _Factor | None = None
    recompute: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def rows(self, length: int) -> int:
        """Return how many windows of ``length`` tokens a step has."""
        return max(1, self.tokens_per_step // length)

    def needed(self, corpus: Corpus, length: int) -> Corpus:
        """Return the windows of ``corpus`` that the steps can reach, all of them where they are no more than that.

        As many as the steps have rows, and what fills the last batch in which a teacher is asked. They are a sample,
        the same for every seed, and those of fewer steps are among those of more, so that what a teacher said of them
        is of use again.
        """
        together = rows_for(length)
        count = -(-self.steps * self.rows(length) // together) * together
        if count >= len(corpus.windows):
            return corpus
        chosen = {id(window) for window in in_sampled_order(corpus.windows)[:count]}
        windows = [window for window in corpus.windows if id(window) in chosen]
        tokens = dict.fromkeys(corpus.tokens, 0)
        for window in windows:
            tokens[window.domain] += len(window.tokens)
        return replace(corpus, windows=windows, tokens=tokens)


def in_sampled_order(windows: Sequence[Window]) -> list[Window]:
    """Return ``windows`` in an order that depends on each of them alone and is like chance."""
    return sorted(windows, key=window_name)


def window_name(window: Window) -> str:
    """Return a name of the window's tokens: a hash of them."""
    return hashlib.blake2b(window.tokens.tobytes(), digest_size=8).hexdigest()


def endless(corpus: Corpus, rows: int, seed: int, device: torch.device, *, done: int = 0) -> Iterator[Batch]:
    """Yield shuffled batches, all domains mixed, epoch after epoch; those of the first ``done`` steps are left out."""
    rng = np.random.default_rng(seed)
    number = 0
    while True:
        order = rng.permutation(len(corpus.windows))
        for start in range(0, len(order), rows):
            number += 1
            if number > done:
                yield to_batch([corpus.windows[index] for index in order[start : start + rows]], device)


def pace(step: int, steps: int, warmup: float = 0.05) -> float:
    """Warm up over this share of the run, then decay with a cosine to a tenth."""
    warm = max(1, int(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
