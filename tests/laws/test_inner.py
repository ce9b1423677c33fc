"""Inner products against plain float64.

Legend: T tokens, N tokens of the sample, E experts, m experts run for a token, K experts per token, H hidden.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moesurgeon.engine.routing import Routing
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.profiling.all_experts import AllExperts, InnerSpec, likeliest_experts
from moesurgeon.profiling.inner import Inner
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.traces.windows import Corpus
from tests.engine.small import batches_for, saved, small_model, source_of
from tests.laws.inner_cases import CASES, COUNT, LENGTH, Taken, checkpoint, observed, random_corpus, take


@pytest.fixture(scope="module", params=CASES)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    folder = tmp_path_factory.mktemp("inner")
    return take(checkpoint(request.param, folder / "model"), folder)


def test_inner_products_are_those_of_experts_run_by_hand(taken: Taken) -> None:
    """In float64, expert by expert, from the inputs that the blocks had."""
    for layer, (seen,) in observed(taken, [Stream(taken.source)]).items():
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
    subject = checkpoint("deepseek v3", tmp_path / "model")
    plain = take(subject, tmp_path).inner
    corpus = random_corpus()
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


def test_an_expert_that_overflows_on_tokens_of_others_is_an_error(tmp_path: Path) -> None:
    model = small_model("deepseek_v3", n_group=1, topk_group=1)
    block = model.model.layers[1].mlp
    with torch.no_grad():
        block.gate.e_score_correction_bias[5] = -100.0  # never chosen
        block.experts.down_proj[5] = 1e38
        block.experts.gate_up_proj[5] *= 1e3
    with pytest.raises(CheckpointError, match="layer 1: an expert that was run on tokens of others"):
        take(saved(model, tmp_path / "model"), tmp_path)
