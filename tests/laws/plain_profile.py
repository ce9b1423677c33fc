"""A profile computed the plain way: hooks on the stock model, token by token, in float64, and no sum twice.

Legend: T tokens, E experts, K experts per token, H hidden, F expert width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesurgeon.pipeline.subject import Subject
from moesurgeon.profiling.statistics import PEAK, shapes_of
from moesurgeon.traces.windows import Corpus, Window


@dataclass
class Seen:
    """What hooks saw of one block in one window: its input [T, H] and what its router returned."""

    inputs: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor


@contextmanager
def _hooked(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, Seen]]:
    """Record every mixture block of the stock model with forward hooks on its router."""
    seen: dict[int, Seen] = {}
    handles = []
    for layer in layers:

        def hook(_router: Any, inputs: Any, output: Any, layer: int = layer) -> None:
            logits, weights, indices = (part.detach().clone() for part in output)
            seen[layer] = Seen(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).clone(), logits, weights, indices)

        handles.append(model.get_submodule(f"model.layers.{layer}.mlp.gate").register_forward_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def by_hand(subject: Subject, windows: Sequence[Window]) -> Iterator[tuple[int, Seen, torch.nn.Module]]:
    """Run a fresh stock model on one window at a time; yield each block's observations."""
    stock = AutoModelForCausalLM.from_pretrained(subject.root, dtype=torch.float32).eval()
    with _hooked(stock, subject.anatomy.moe_layers) as seen, torch.no_grad():
        for window in windows:
            stock(input_ids=torch.from_numpy(window.tokens.astype(np.int64))[None])
            for layer, block in seen.items():
                yield layer, block, stock.get_submodule(f"model.layers.{layer}.mlp")


@dataclass
class Token:
    """One token in one layer (``row``): where it stood, whom it was given to (the largest weight first), all scores."""

    window: Window
    position: int
    row: int
    chosen: list[tuple[int, float, float]]  # expert, w, |f|
    scores: list[float]


def tokens_of(subject: Subject, windows: Sequence[Window]) -> Iterator[Token]:
    """Yield every token in every layer; each chosen expert is run on it by hand."""
    assert subject.anatomy.family.router.scoring == "softmax"
    for number, (layer, seen, block) in enumerate(by_hand(subject, windows)):
        window = windows[number // len(subject.anatomy.moe_layers)]
        scores_TE = (seen.inputs.double() @ block.gate.weight.double().T).softmax(-1)
        for position in range(len(seen.inputs)):
            x_H = seen.inputs[position].double()
            chosen = []
            for expert, weight in zip(seen.indices[position].tolist(), seen.weights[position].tolist(), strict=True):
                gate_F, up_F = (block.experts.gate_up_proj[expert].double() @ x_H).chunk(2)
                f_H = block.experts.down_proj[expert].double() @ (gate_F * gate_F.sigmoid() * up_F)
                chosen.append((expert, weight, float(f_H.norm())))
            chosen.sort(key=lambda of: -of[1])
            row = subject.anatomy.moe_layers.index(layer)
            yield Token(window, position, row, chosen, scores_TE[position].tolist())


def plain_sums(
    tokens: Sequence[Token],
    corpus: Corpus,
    dispatched: Sequence[Sequence[Window]],
    *,
    shape: tuple[int, int, int],
    positions: Sequence[int],
    sizes: Sequence[int],
    factors: Sequence[float],
    block: int,
    bins: int,
    folds: int,
) -> dict[str, np.ndarray]:
    """Return every sum of a profile; ``shape``: layers, experts, top-k; ``dispatched``: the windows of each batch."""
    layers, experts, top_k = shape
    sums = {name: np.zeros(size) for name, size in shapes_of(len(corpus.domains), layers, experts, top_k).items()}
    documents: dict[tuple[int, int], list[Window]] = {}
    for window in corpus.windows:
        domain = corpus.domains.index(window.domain)
        documents.setdefault((domain, window.document), []).append(window)
        for position in range(len(window.tokens)):
            sums["seen"][domain, _bucket(position, positions)] += 1
    fold_of = {}
    for (domain, number), windows in documents.items():
        digest = min(hashlib.blake2b(window.tokens.tobytes(), digest_size=8).digest() for window in windows)
        fold_of[domain, number] = int.from_bytes(digest, "big") % folds
        length = sum(len(window.tokens) for window in windows)
        sums["documents"][domain] += 1
        sums["documents.squares"][domain] += length**2
        sums["seen.folds"][domain, fold_of[domain, number]] += length
    clustered = {key: np.zeros((4, layers, experts)) for key in documents}
    for token in tokens:
        domain, bucket = corpus.domains.index(token.window.domain), _bucket(token.position, positions)
        ordered = sorted(token.scores, reverse=True)
        entropy, margin = -sum(p * math.log(p) for p in ordered), ordered[0] - ordered[1]
        sums["entropy"][domain, bucket, token.row] += entropy
        sums["margin"][domain, bucket, token.row] += margin
        sums["entropy_bins"][domain, token.row, min(bins - 1, int(entropy / math.log(experts) * bins))] += 1
        sums["margin_bins"][domain, token.row, min(bins - 1, int(margin * bins))] += 1
        sums["first_choice"][domain, bucket, token.row, token.scores.index(ordered[0])] += 1
        for rank, (expert, w, norm) in enumerate(token.chosen):
            place = domain, bucket, token.row, expert
            for name, value in (("tokens", 1), ("weight", w), ("norm", norm), ("norm2", norm**2),
                                ("weighted_norm", w * norm), ("weighted_norm2", (w * norm) ** 2)):  # fmt: skip
                sums[name][place] += value
            sums[PEAK][place] = max(sums[PEAK][place], w * norm)
            sums["ranks"][domain, token.row, rank, expert] += 1
            clustered[domain, token.window.document][:, token.row, expert] += (1, w, norm, w * norm)
            for other, _, _ in token.chosen:
                sums["together"][token.row, expert, other] += 1
    for (domain, number), of_document in clustered.items():
        length = sum(len(window.tokens) for window in documents[domain, number])
        for name, x in zip(("tokens", "weight", "norm", "weighted_norm"), of_document, strict=True):
            sums[f"{name}.squares"][domain] += x**2
            sums[f"{name}.by_document"][domain] += x * length
            sums[f"{name}.by_tokens"][domain] += x * of_document[0]
            sums[f"{name}.folds"][domain, fold_of[domain, number]] += x
    by_window: dict[tuple[int, int], list[Token]] = {}
    for token in tokens:
        by_window.setdefault((id(token.window), token.row), []).append(token)
    for batch in dispatched:
        for row in range(layers):
            for number, size in enumerate(sizes):
                for group in _groups(batch, size):
                    together = [token for window in group for token in by_window[id(window), row]]
                    choices = [[e for token in together for e, _, _ in token.chosen],
                               [token.scores.index(max(token.scores)) for token in together]]  # fmt: skip
                    for gate, given in enumerate(choices):
                        _dispatch(sums, (row, number, gate), given, experts, factors, block)
    return sums


def _dispatch(
    sums: dict[str, np.ndarray],
    place: tuple[int, int, int],
    choices: list[int],
    experts: int,
    factors: Sequence[float],
    block: int,
) -> None:
    """Hand out places one choice after the other, as a runtime with a capacity does."""
    row, size, gate = place
    loads = [choices.count(expert) for expert in range(experts)]
    padded = sum(-(-load // block) * block for load in loads)
    sums["dispatch"][place] += (1, max(loads), padded, len(choices))
    for number, factor in enumerate(factors):
        capacity = max(4, math.ceil(len(choices) / experts * factor))
        left, dropped = [capacity] * experts, 0
        for expert in choices:
            if left[expert]:
                left[expert] -= 1
            else:
                dropped += 1
        sums["capacity"][row, size, number, gate] += (len(choices), dropped, capacity * experts)


def _groups(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Yield windows in order until they have ``size`` tokens; not if that is over twice, or in the end under half."""
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if (held := sum(len(each.tokens) for each in group)) >= size:
            if held <= 2 * size:
                yield group
            group = []
    if group and sum(len(each.tokens) for each in group) >= size / 2:
        yield group


def _bucket(position: int, positions: Sequence[int]) -> int:
    return max(number for number, start in enumerate(positions) if start <= position)
