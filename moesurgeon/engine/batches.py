"""Windows of tokens as tensors on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.traces.batching import batches
from moesurgeon.traces.windows import Corpus, Window


@dataclass(frozen=True, slots=True)
class Batch:
    """``tokens`` [B, T], padded on the right; ``mask`` [B, T] is 1 on text, None without padding."""

    domain: str
    windows: Sequence[Window]
    tokens: torch.Tensor
    mask: torch.Tensor | None

    @property
    def is_text(self) -> torch.Tensor:
        """[B, T], True where there is text."""
        if self.mask is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return self.mask.bool()

    @property
    def text_tokens(self) -> int:
        return sum(len(window.tokens) for window in self.windows)


def batches_of(corpus: Corpus, *, rows: int, device: torch.device, tokens: int = 0) -> Iterator[Batch]:
    """Yield the corpus in batches of up to ``rows`` windows of one domain and about one length.

    Short windows come in larger batches, up to ``tokens``.
    """
    for domain in corpus.domains:
        mine = [window for window in corpus.windows if window.domain == domain]
        for group in batches(mine, rows, tokens):
            yield to_batch(group, device)


def to_batch(windows: Sequence[Window], device: torch.device) -> Batch:
    """Pad ``windows`` to one length."""
    length = max(len(window.tokens) for window in windows)
    tokens = np.zeros((len(windows), length), dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens)] = window.tokens
        mask[row, : len(window.tokens)] = 1
    padded = None if mask.all() else torch.from_numpy(mask).to(device)
    return Batch(windows[0].domain, windows, torch.from_numpy(tokens).to(device), padded)


def rows_for(length: int, tokens: int = BATCH_TOKENS) -> int:
    """Return how many windows of this length make a batch of about ``tokens``."""
    return max(1, tokens // length)
