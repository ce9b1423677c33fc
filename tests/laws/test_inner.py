"""Inner products against plain float64, and what they say of subsets and top-k against blocks that really route so.

Legend: T tokens, N tokens of the sample, E experts, m experts run for a token, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation
from moesurgeon.engine.routing import Routing, selection_bias
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.profiling.all_experts import AllExperts, InnerSpec, likeliest_experts, rule_of
from moesurgeon.profiling.inner import Inner, InnerLayer
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.profiling.sample import sampled_rows
from moesurgeon.profiling.subset_errors import SubsetErrors, errors_of_subsets, routing_at
from moesurgeon.surgery.retop import RetopSpec, plan_retop
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


def _checkpoint(case: str, folder: Path) -> Subject:
    family, changes = CASES[case]
    if family in factory.FAMILIES and family not in ("mixtral", "deepseek_v2", "deepseek_v3", "qwen2_moe"):
        return open_subject(str(factory.save_checkpoint(folder, family)))
    return saved(small_model(family, **changes), folder)


def _corpus() -> Corpus:
    return corpus_of(
        random_windows("one", count=7, vocabulary=96, longest=LENGTH),
        random_windows("two", count=5, vocabulary=96, longest=LENGTH),
    )


@dataclass
class Taken:
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


def _take(
    subject: Subject, path: Path, experts: int = 64, placement: Placement | None = None, count: int = COUNT
) -> Taken:
    source = source_of(subject) if placement is None else source_of(subject, placement)
    corpus = _corpus()
    batches = batches_for(corpus, LENGTH, 3)
    collector = AllExperts(
        subject.anatomy, corpus.domains, batches, InnerSpec(tokens=count, experts=experts), path / "inner.safetensors"
    )
    collector.open()
    take_profile(Stream(source), corpus.domains, batches, extras=[collector])
    inner = Inner.open(path / "inner.safetensors", collector.shape, rule_of(subject.anatomy))
    return Taken(subject, source, batches, inner)


@pytest.fixture(scope="module", params=CASES)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    folder = tmp_path_factory.mktemp("inner")
    return _take(_checkpoint(request.param, folder / "model"), folder)


def _observed(taken: Taken, streams: Sequence[Stream]) -> dict[int, list[list[tuple[MoeBlock, Observation]]]]:
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


def test_inner_products_are_those_of_experts_run_by_hand(taken: Taken) -> None:
    """In float64, expert by expert, from the inputs that the blocks had."""
    for layer, (seen,) in _observed(taken, [Stream(taken.source)]).items():
        found = taken.inner.layer(layer)
        start = 0
        for (at, gate_up, down, act, bias), rows in zip(seen, taken.rows, strict=True):
            n = slice(start, start + len(rows))
            start += len(rows)
            x_NH = at.inputs[rows].double()
            f_NEH = torch.zeros(len(rows), len(down), x_NH.shape[-1], dtype=torch.float64)
            for expert in range(len(down)):
                gate, up = (x_NH @ gate_up[expert].double().T).chunk(2, dim=-1)
                f_NEH[:, expert] = (act(gate) * up) @ down[expert].double().T
            y_NH = torch.zeros_like(x_NH)
            for rank in range(at.indices.shape[-1]):
                chosen = f_NEH[torch.arange(len(rows)), at.indices[rows, rank]]
                y_NH += at.weights[rows, rank, None].double() * chosen
            size = float(y_NH.square().sum(-1).mean())
            assert found.experts is None
            for name, array, expected in (
                ("gram", found.gram[n], torch.einsum("nih,njh->nij", f_NEH, f_NEH)),
                ("with_output", found.with_output[n], torch.einsum("nih,nh->ni", f_NEH, y_NH)),
                ("output", found.output[n], y_NH.square().sum(-1)),
            ):
                np.testing.assert_allclose(array, expected.numpy(), rtol=2e-5, atol=2e-5 * size, err_msg=name)
            assert np.array_equal(found.logits[n], at.logits[rows].float().numpy())
            assert (found.bias is None) == (bias is None)
            if bias is not None:
                assert np.array_equal(found.bias, bias.numpy())
        assert start == taken.inner.shape.tokens


def test_tokens_know_their_domain_and_the_fold_of_their_document(taken: Taken) -> None:
    domains = [batch.domain for batch, rows in zip(taken.batches, taken.rows, strict=True) for _ in rows]
    assert [("one", "two")[number] for number in taken.inner.domain] == domains
    of_document: dict[tuple[str, int], set[int]] = {}
    folds = iter(taken.inner.fold.tolist())
    for batch, rows in zip(taken.batches, taken.rows, strict=True):
        for row in rows:
            window = batch.windows[row // batch.tokens.shape[1]]
            of_document.setdefault((window.domain, window.document), set()).add(next(folds))
    assert all(len(found) == 1 for found in of_document.values())
    assert len(set.union(*of_document.values())) > 1


def _really(taken: Taken, overlays: Sequence[tuple[Overlay, int | None]]) -> dict[int, np.ndarray]:
    """Return by layer, for each overlay (and top-k by hand), the mean error of the whole block on the sample."""
    streams = [Stream(taken.source), *(Stream(taken.source, overlay) for overlay, _ in overlays)]
    for stream, (_, top_k) in zip(streams[1:], overlays, strict=True):
        for block in stream.blocks.values() if top_k else ():
            block.router.top_k = top_k
    errors = {}
    for layer, (original, *others) in _observed(taken, streams).items():
        sums = np.zeros(len(others))
        for number, rows in enumerate(taken.rows):
            y = original[number][0].result[rows].double()
            for place, each in enumerate(others):
                sums[place] += float((each[number][0].result[rows].double() - y).square().sum())
        errors[layer] = sums / taken.inner.shape.tokens
    return errors


def test_they_say_what_masked_experts_and_another_top_k_cost(taken: Taken) -> None:
    """The real block with the experts masked in its router, shared experts and all."""
    anatomy, experts = taken.subject.anatomy, range(8)
    subsets = {
        1: [(0, 1, 2), (5, 6, 7), (0, 2, 4, 6), (0, 1, 2, 3, 4, 5, 7)],
        2: [(0, 2, 3, 4, 6, 7), (0, 2, 4, 6), (1, 3, 4, 7), (0, 1, 2, 3, 6, 7)],
        4: [(0, 1, 2, 3, 6, 7), (2, 3, 4, 5), (0, 1, 2, 3, 4, 5)],
    }[anatomy.groups[0]]
    subsets.append(tuple(experts))
    asked = [(kept, top_k) for kept in subsets for top_k in {1, anatomy.top_k}]
    overlays = [
        Overlay(
            plan=None if top_k == anatomy.top_k else plan_retop(anatomy, RetopSpec(top_k=top_k)),
            masked={layer: frozenset(experts) - set(kept) for layer in anatomy.moe_layers},
        )
        for kept, top_k in asked
    ]
    for layer, expected in _really(taken, [(overlay, None) for overlay in overlays]).items():
        size = float(taken.inner.layer(layer).output.mean())
        assert (expected > 1e-2 * size).sum() > len(asked) / 3  # it did cost something
        for (kept, top_k), error in zip(asked, expected, strict=True):
            found = taken.errors(layer, [kept], top_k)
            assert found.covered.tolist() == [1.0]
            assert found.error[0] == pytest.approx(error, rel=2e-5, abs=2e-6 * size), (layer, kept, top_k)
            assert found.relative[0] == pytest.approx(error / size, rel=2e-5, abs=2e-6)
            if len(kept) == 8 and top_k == anatomy.top_k:
                assert found.relative[0] < 1e-6


def test_they_say_what_more_experts_would_give(tmp_path: Path) -> None:
    taken = _take(_checkpoint("mixtral", tmp_path / "model"), tmp_path)
    dropped = Overlay(masked=dict.fromkeys(taken.subject.anatomy.moe_layers, frozenset({3})))
    for layer, (plain, cut) in _really(taken, [(Overlay(), 4), (dropped, 3)]).items():
        assert taken.errors(layer, [range(8)], 4).error[0] == pytest.approx(plain, rel=2e-5)
        assert taken.errors(layer, [(0, 1, 2, 4, 5, 6, 7)], 3).error[0] == pytest.approx(cut, rel=2e-5)


def test_all_subsets_at_once_and_in_small_pieces_are_those_one_by_one(taken: Taken) -> None:
    top_k = taken.subject.anatomy.top_k
    groups = taken.subject.anatomy.groups[0]
    # In groups of two, both go or none.
    subsets = [
        kept
        for kept in combinations(range(8), 6)
        if groups < 4 or all((e in kept) == (e + 1 in kept) for e in (0, 2, 4, 6))
    ]
    layer = taken.subject.anatomy.moe_layers[-1]
    at_once, pieces = taken.errors(layer, subsets, top_k), taken.errors(layer, subsets, top_k, at_once=1 << 12)
    # A softmax in float32 is rounded in another way for another number of rows.
    alone = [taken.errors(layer, [subset], top_k).error[0] for subset in subsets]
    np.testing.assert_allclose(at_once.error, alone, rtol=1e-6)
    np.testing.assert_allclose(pieces.error, alone, rtol=1e-6)
    of_domain = [taken.errors(layer, subsets, top_k, tokens=taken.inner.domain == number).error for number in range(2)]
    counts = np.bincount(taken.inner.domain)
    np.testing.assert_allclose(counts @ of_domain / counts.sum(), at_once.error, rtol=1e-6)
    none = taken.errors(layer, subsets, top_k, tokens=np.zeros(taken.inner.shape.tokens, dtype=bool))
    assert np.isnan(none.error).all() and np.isnan(none.relative).all() and not none.covered.any()


@pytest.mark.parametrize(
    ("groups", "score", "kept", "top_k", "message"),
    [
        ((1, 1), "max", (0, 1), 2, None),
        ((1, 1), "max", (0, 1), 3, "of 2 experts .* keep at least 3"),
        ((4, 2), "max", (0, 2, 4, 6), 2, None),
        ((4, 2), "max", (0, 1, 2, 4, 6), 3, "of 2 experts .* keep at least 3"),
        ((4, 2), "max", (0, 1, 2, 3), 4, None),
        ((4, 2), "max", (0, 1), 2, "fewer than 2 groups"),
        ((4, 2), "top2-sum", (0, 1, 2, 4, 5), 4, None),  # that of 2 alone never wins
        ((4, 2), "top2-sum", (0, 1, 2, 4, 6), 2, "fewer than 2 groups"),
    ],
)
def test_a_subset_that_cannot_give_a_token_enough_is_refused(
    groups: tuple[int, int], score: str, kept: tuple[int, ...], top_k: int, message: str | None
) -> None:
    routing = Routing("sigmoid", True, 1.0, *groups, score)
    mask = np.isin(np.arange(8), kept)[None]
    one = InnerLayer(
        np.ones((1, 8, 8), np.float32), np.ones((1, 8), np.float32), np.ones(1, np.float32),
        np.arange(8, dtype=np.float32)[None], None, None,
    )  # fmt: skip
    if message is None:
        assert errors_of_subsets(one, routing, mask, top_k).error == pytest.approx(0, abs=1e-6)
        return
    with pytest.raises(UsageError, match=message):
        errors_of_subsets(one, routing, mask, top_k)


@pytest.mark.parametrize("case", ["mixtral", "deepseek v1", "deepseek v2, groups", "deepseek v3", "minimax m2, bias"])
def test_of_the_likeliest_experts_alone_covered_tokens_are_exact(case: str, tmp_path: Path) -> None:
    subject = _checkpoint(case, tmp_path / "model")
    (tmp_path / "few").mkdir()
    whole, few = _take(subject, tmp_path), _take(subject, tmp_path / "few", experts=4)
    top_k = subject.anatomy.top_k
    for layer in subject.anatomy.moe_layers:
        all_of, some = whole.inner.layer(layer), few.inner.layer(layer)
        assert some.gram.shape == (COUNT, 4, 4)
        tiny = 1e-6 * float(some.output.mean())
        assert some.experts is not None and (np.diff(some.experts.astype(int)) > 0).all()
        at = some.experts.astype(int)
        tokens = np.arange(COUNT)
        np.testing.assert_allclose(
            some.gram, all_of.gram[tokens[:, None, None], at[:, :, None], at[:, None, :]], rtol=1e-5, atol=tiny
        )
        np.testing.assert_allclose(some.with_output, all_of.with_output[tokens[:, None], at], rtol=1e-5, atol=tiny)
        assert np.array_equal(some.output, all_of.output) and np.array_equal(some.logits, all_of.logits)
        # What was chosen is there: the model as it is has no error, and nothing is left out.
        found = few.errors(layer, [range(8)], top_k)
        assert found.covered.tolist() == [1.0] and found.relative[0] < 1e-6
        kept = (0, 1, 4, 5) if subject.anatomy.groups[0] > 1 else (0, 2, 4, 6)
        found = few.errors(layer, [kept], top_k)
        assert 0 < found.covered[0] < 1
        # The same tokens, judged with all experts at hand.
        covered = np.array(
            [few.errors(layer, [kept], top_k, tokens=tokens == token).covered[0] == 1 for token in tokens]
        )
        assert covered.mean() == found.covered[0]
        expected = whole.errors(layer, [kept], top_k, tokens=covered).error[0]
        assert found.error[0] == pytest.approx(expected, rel=1e-5, abs=tiny)


def test_likeliest_are_first_those_chosen_then_those_of_winning_groups() -> None:
    routing = Routing("sigmoid", True, 1.0, 4, 2, "top2-sum")
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(50, 16, generator=generator), torch.randn(16, generator=generator)
    scores = routing.scores(logits)
    chosen = routing.choose(scores, bias, 3)
    for count in (3, 5, 8, 11, 16):
        found = likeliest_experts(routing, logits, chosen, bias, count)
        for token in range(50):
            ranked = routing.ranked(scores, bias)[token]
            inside = [e for e in range(16) if ranked[e] > -torch.inf]
            plain = scores[token] + bias
            order = sorted(inside, key=lambda e: -float(plain[e]))
            order += sorted(set(range(16)) - set(inside), key=lambda e: -float(plain[e]))
            assert set(order[:3]) == set(chosen[token].tolist())
            assert found[token].tolist() == sorted(order[:count])
    # A tie that the block broke the other way.
    flat = torch.zeros(1, 4)
    plain_rule = Routing("softmax", True, 1.0, 1, 1, "max")
    assert likeliest_experts(plain_rule, flat, torch.tensor([[2, 3]]), None, 3).tolist() == [[0, 2, 3]]


def test_too_few_experts_for_a_token_are_refused(tiny: Subject) -> None:
    with pytest.raises(UsageError, match=f"raise it to at least {tiny.anatomy.top_k}"):
        InnerSpec(tokens=5, experts=1).shape(tiny.anatomy, 100)


def test_order_and_batches_do_not_matter(tmp_path: Path) -> None:
    subject = _checkpoint("deepseek v3", tmp_path / "model")
    plain = _take(subject, tmp_path).inner
    corpus = _corpus()
    windows = [corpus.windows[place] for place in np.random.default_rng(2).permutation(len(corpus.windows))]
    shuffled = Corpus(windows=windows, tokens=corpus.tokens)
    batches = batches_for(shuffled, LENGTH)
    path = tmp_path / "other" / "inner.safetensors"
    collector = AllExperts(subject.anatomy, shuffled.domains, batches, InnerSpec(tokens=COUNT), path)
    collector.open()
    take_profile(Stream(source_of(subject)), shuffled.domains, batches, extras=[collector])
    other = Inner.open(path, collector.shape, plain.rule)
    for layer in subject.anatomy.moe_layers:
        one, two = plain.layer(layer), other.layer(layer)
        first, second = np.lexsort(one.logits.round(3).T), np.lexsort(two.logits.round(3).T)
        np.testing.assert_allclose(one.gram[first], two.gram[second], rtol=1e-4, atol=1e-4)
        assert np.array_equal(plain.fold[first], other.fold[second])


def test_in_bfloat16_the_model_as_it_is_has_an_error_of_rounding_only(tmp_path: Path) -> None:
    model = small_model("mixtral").to(torch.bfloat16)
    taken = _take(saved(model, tmp_path / "model"), tmp_path, placement=Placement(torch.device("cpu"), torch.bfloat16))
    for layer in taken.subject.anatomy.moe_layers:
        assert taken.errors(layer, [range(8)], 2).relative[0] < 1e-4
        assert taken.errors(layer, [range(6)], 2).relative[0] > 1e-2


def test_an_expert_that_overflows_on_tokens_of_others_is_an_error(tmp_path: Path) -> None:
    model = small_model("deepseek_v3", n_group=1, topk_group=1)
    block = model.model.layers[1].mlp
    with torch.no_grad():
        block.gate.e_score_correction_bias[5] = -100.0  # never chosen
        block.experts.down_proj[5] = 1e38
        block.experts.gate_up_proj[5] *= 1e3
    with pytest.raises(CheckpointError, match="layer 1: an expert that was run on tokens of others"):
        _take(saved(model, tmp_path / "model"), tmp_path)
