"""Losses of a model, and how far it is from a teacher, summed per window of text.

Legend: B windows, T tokens, V vocabulary. Logits exist for a block of positions at a time only: the
full [B, T, V] of a long batch would be larger than the model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moesurgeon.engine.batches import Batch, batches_of, rows_for
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.windows import Corpus

_BLOCK = 2048  # positions whose logits are held at once

LOSS, TEACHER_LOSS, KL, AGREEMENT, ESAP = range(5)
"""Columns of the sums: cross-entropy in nats, the teacher's, KL(teacher | model), share of positions
with the same most likely token, and the sum over the vocabulary of min(p, q) (ESAP, EvoESAP)."""
_COLUMNS = 5


@dataclass(frozen=True)
class Measurement:
    """Sums per window. ``domain`` and ``document`` [W] number them, ``positions`` [W] counts the
    predicted tokens, ``sums`` [W, 5] holds the columns above; ``by_position`` [P, 6] the same per
    position in the window, with the count last. ``tokens_per_second``: of the
    model alone, the median over batches: one busy moment of the machine does not count.
    """

    domains: tuple[str, ...]
    domain: NDArray[np.int64]
    document: NDArray[np.int64]
    positions: NDArray[np.int64]
    sums: NDArray[np.float64]
    by_position: NDArray[np.float64]
    tokens_per_second: float
    tokens: int
    has_teacher: bool


def measure(
    model: PreTrainedModel,
    corpus: Corpus,
    *,
    length: int,
    teacher: PreTrainedModel | None = None,
    progress: Progress = SILENT,
    label: str = "evaluating",
) -> Measurement:
    """Run ``model`` (and ``teacher`` beside it) over ``corpus``."""
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise UsageError(
            f"vocabularies differ ({model.config.vocab_size} and {teacher.config.vocab_size} tokens): "
            "only checkpoints with the same tokenizer can be compared"
        )
    rows: list[tuple[int, int, int]] = []
    sums: list[NDArray[np.float64]] = []
    by_position = np.zeros((length, _COLUMNS + 1))
    speeds: list[float] = []
    tokens = sum(corpus.tokens.values())
    with progress.task(label, tokens, "tokens") as advance:
        for batch in batches_of(corpus, rows=rows_for(length), device=model.device):
            hidden, took = _hidden(model, batch)
            speeds.append(batch.text_tokens / took)
            beside = _hidden(teacher, batch)[0] if teacher is not None else None
            values_BTC = _compare(model, hidden, teacher, beside, batch)
            valid = batch.is_text[:, 1:].cpu().numpy()
            values_BTC[~valid] = 0.0
            for row, window in enumerate(batch.windows):
                rows.append((corpus.domains.index(batch.domain), window.document, int(valid[row].sum())))
                sums.append(values_BTC[row].sum(axis=0))
            by_position[: valid.shape[1], :_COLUMNS] += values_BTC.sum(axis=0)
            by_position[: valid.shape[1], _COLUMNS] += valid.sum(axis=0)
            advance(batch.text_tokens)
    if not np.isfinite(by_position).all():
        raise CheckpointError(
            "the loss is not a number: the weights hold NaN or infinities, or overflow in this --dtype; try float32"
        )
    domain, document, positions = np.array(rows, dtype=np.int64).T
    return Measurement(
        corpus.domains,
        domain,
        document,
        positions,
        np.stack(sums),
        by_position,
        float(np.median(speeds)),
        tokens,
        teacher is not None,
    )


@torch.no_grad()
def _hidden(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, float]:
    """Return the last hidden states [B, T, H] and the seconds that they took."""
    started = time.perf_counter()
    hidden: torch.Tensor = model.base_model(
        input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    if hidden.device.type != "cpu":
        torch.accelerator.synchronize(hidden.device)
    return hidden, time.perf_counter() - started


@torch.no_grad()
def _compare(
    model: PreTrainedModel,
    hidden_BTH: torch.Tensor,
    teacher: PreTrainedModel | None,
    teacher_BTH: torch.Tensor | None,
    batch: Batch,
) -> NDArray[np.float64]:
    """Return the columns [B, T - 1, 5] for predicting tokens 1 to T - 1."""
    rows, length = batch.tokens.shape
    values = torch.zeros(rows, length - 1, _COLUMNS, dtype=torch.float64)
    step = max(1, _BLOCK // rows)
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        targets = batch.tokens[:, start + 1 : stop + 1, None]
        logp = _log_probabilities(model, hidden_BTH[:, start:stop])
        block = values[:, start:stop]
        block[..., LOSS] = -logp.gather(-1, targets).squeeze(-1).double().cpu()
        if teacher is None or teacher_BTH is None:
            continue
        logq = _log_probabilities(teacher, teacher_BTH[:, start:stop])
        p, q = logp.exp(), logq.exp()
        block[..., TEACHER_LOSS] = -logq.gather(-1, targets).squeeze(-1).double().cpu()
        block[..., KL] = (q * (logq - logp)).sum(-1, dtype=torch.float64).cpu()
        block[..., AGREEMENT] = (logp.argmax(-1) == logq.argmax(-1)).double().cpu()
        block[..., ESAP] = torch.minimum(p, q).sum(-1, dtype=torch.float64).cpu()
    return values.numpy()


def _log_probabilities(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    # Granite divides its logits behind the head; no other family that we run scales or caps them.
    logits = logits / getattr(model.config, "logits_scaling", 1.0)
    return logits.float().log_softmax(-1)
