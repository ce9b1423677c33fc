"""Checkpoints of many routers with the inner products of their experts, for the laws about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation
from moesurgeon.engine.routing import selection_bias
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.profiling.all_experts import AllExperts, InnerSpec, rule_of
from moesurgeon.profiling.inner import Inner
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.profiling.sample import sampled_rows
from moesurgeon.profiling.subset_errors import SubsetErrors, errors_of_subsets, routing_at
from moesurgeon.traces.windows import Corpus
from tests.engine.small import batches_for, corpus_of, random_windows, saved, small_model, source_of
from tests.families import factory

LENGTH, COUNT = 40, 60
# Families and the ways that their configs can route.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, top-3": ("mixtral", {"num_experts_per_tok": 3}),
    "deepseek v1": ("deepseek_v1", {}),
    "deepseek v1, renormalised": ("deepseek_v1", {"norm_topk_prob": True}),
    "deepseek v2, groups": ("deepseek_v2", {}),
    "deepseek v2, two groups": ("deepseek_v2", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}),
    "deepseek v2, greedy": ("deepseek_v2", {"topk_method": "greedy"}),
    "deepseek v3": ("deepseek_v3", {}),
    "deepseek v3, two groups": ("deepseek_v3", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}),
    "deepseek v3, raw": ("deepseek_v3", {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
    "qwen2": ("qwen2_moe", {}),
    "minimax m2, bias": ("minimax_m2", {}),
    "ernie, bias": ("ernie4_5_moe", {}),
}


def checkpoint(case: str, folder: Path) -> Subject:
    family, changes = CASES[case]
    if family in factory.FAMILIES and family not in ("mixtral", "deepseek_v2", "deepseek_v3", "qwen2_moe"):
        return open_subject(str(factory.save_checkpoint(folder, family)))
    return saved(small_model(family, **changes), folder)


def random_corpus() -> Corpus:
    return corpus_of(
        random_windows("one", count=7, vocabulary=96, longest=LENGTH),
        random_windows("two", count=5, vocabulary=96, longest=LENGTH),
    )


@dataclass
class Taken:
    """A checkpoint with the inner products of its experts on some tokens of random text."""

    subject: Subject
    source: Source
    batches: Sequence[Batch]
    inner: Inner

    @property
    def rows(self) -> list[np.ndarray]:
        return sampled_rows(self.batches, self.inner.shape.tokens)

    def errors(self, layer: int, kept: Sequence[Sequence[int]], top_k: int, **options: Any) -> SubsetErrors:
        mask = np.zeros((len(kept), self.inner.shape.experts), dtype=bool)
        for row, experts in enumerate(kept):
            mask[row, list(experts)] = True
        return errors_of_subsets(self.inner.layer(layer), routing_at(self.inner.rule, top_k), mask, top_k, **options)


def take(
    subject: Subject, path: Path, experts: int = 64, placement: Placement | None = None, count: int = COUNT
) -> Taken:
    source = source_of(subject) if placement is None else source_of(subject, placement)
    corpus = random_corpus()
    batches = batches_for(corpus, LENGTH, 3)
    collector = AllExperts(
        subject.anatomy, corpus.domains, batches, InnerSpec(tokens=count, experts=experts), path / "inner.safetensors"
    )
    collector.open()
    take_profile(Stream(source), corpus.domains, batches, extras=[collector])
    inner = Inner.open(path / "inner.safetensors", collector.shape, rule_of(subject.anatomy))
    return Taken(subject, source, batches, inner)


def observed(taken: Taken, streams: Sequence[Stream]) -> dict[int, list[list[tuple[MoeBlock, Observation]]]]:
    """Return by layer, for each stream and batch, what its block did with what the first stream's got."""
    walk = Walk(streams, taken.batches)
    found: dict[int, list[list[Any]]] = {}
    for layer in walk.layers():
        seen: list[list[Any]] = [[] for _ in streams]
        for number in range(len(taken.batches)):
            for stream, mine in zip(streams, seen, strict=True):
                walk.hidden[stream].put(number, walk.hidden[streams[0]].get(number), layer=layer.number - 1)
                layer.forward(stream, number, partial(_keep, mine))
        found[layer.number] = seen
        for number in range(len(taken.batches)):
            layer.move(streams[0], number)
    return {layer: found[layer] for layer in taken.subject.anatomy.moe_layers}


def _keep(into: list[Any], block: MoeBlock, seen: Observation) -> None:
    parts: Any = block.experts
    bias = selection_bias(block)
    into.append((seen, parts.gate_up_proj.clone(), parts.down_proj.clone(), parts.act_fn, bias))


def real_errors(taken: Taken, overlays: Sequence[tuple[Overlay, int | None]]) -> dict[int, np.ndarray]:
    """Return by layer, for each overlay (and top-k by hand), the mean error of the whole block on the sample."""
    streams = [Stream(taken.source), *(Stream(taken.source, overlay) for overlay, _ in overlays)]
    for stream, (_, top_k) in zip(streams[1:], overlays, strict=True):
        for block in stream.blocks.values() if top_k else ():
            block.router.top_k = top_k
    errors = {}
    for layer, (original, *others) in observed(taken, streams).items():
        sums = np.zeros(len(others))
        for number, rows in enumerate(taken.rows):
            y = original[number][0].result[rows].double()
            for place, each in enumerate(others):
                sums[place] += float((each[number][0].result[rows].double() - y).square().sum())
        errors[layer] = sums / taken.inner.shape.tokens
    return errors
