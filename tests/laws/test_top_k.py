"""What a profile says of fewer experts per token against blocks that really route so.

Legend: T tokens, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.pipeline.top_k import by_layer
from moesurgeon.profiling.collapse import loads_at
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.laws.inner_cases import LENGTH, Taken, checkpoint, observed, random_corpus, take
from tests.laws.test_reconstruction import _profile

# Renormalised, raw, single choices raw, sigmoid scores with a bias and groups, a softmax with a bias.
CASES = (
    "mixtral, top-3",
    "deepseek v1",
    "deepseek v1, renormalised",
    "deepseek v2, groups",
    "deepseek v2, greedy",
    "deepseek v3",
    "deepseek v3, two groups",
    "deepseek v3, raw",
    "qwen2",
    "minimax m2, bias",
    "ernie, bias",
)


@pytest.fixture(scope="module", params=CASES)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    folder = tmp_path_factory.mktemp("top-k")
    return take(checkpoint(request.param, folder / "model"), folder)


def _retopped(taken: Taken) -> list[Stream]:
    """Return the checkpoint at every top-k from 1 to its own, as ``retop`` would write it."""
    anatomy = taken.subject.anatomy
    plans = [plan_retop(anatomy, RetopSpec(top_k=k)) for k in range(1, anatomy.top_k)]
    return [*(Stream(taken.source, Overlay(plan=plan)) for plan in plans), Stream(taken.source)]


def test_errors_and_scales_are_those_of_blocks_at_every_k(taken: Taken) -> None:
    anatomy = taken.subject.anatomy
    report = by_layer(anatomy, _profile(taken), 1, 1.5)
    assert list(report["per_layer"]) == [str(layer) for layer in anatomy.moe_layers]
    costly = 0
    for layer, (original, *others) in observed(taken, [Stream(taken.source), *_retopped(taken)]).items():
        found = report["per_layer"][str(layer)]
        assert list(found["errors"]) == list(found["scaled"]) == [str(k) for k in range(1, anatomy.top_k + 1)]
        y_TH = torch.cat([seen[0].output[rows] for seen, rows in zip(original, taken.rows, strict=True)]).double()
        result_TH = torch.cat([seen[0].result[rows] for seen, rows in zip(original, taken.rows, strict=True)]).double()
        size = float(y_TH.square().sum())
        for k, batches in enumerate(others, start=1):
            assert batches[0][0].indices.shape[-1] == k
            z_TH = torch.cat([seen[0].output[rows] for seen, rows in zip(batches, taken.rows, strict=True)]).double()
            whole = torch.cat([seen[0].result[rows] for seen, rows in zip(batches, taken.rows, strict=True)]).double()
            # With shared experts and without.
            for difference in (z_TH - y_TH, whole - result_TH):
                error = float(difference.square().sum()) / size
                assert found["errors"][str(k)] == pytest.approx(error, rel=3e-5, abs=3e-6), (layer, k)
            scale = float((z_TH * y_TH).sum() / z_TH.square().sum())
            assert found["scale"][str(k)] == pytest.approx(scale, rel=1e-5), (layer, k)
            left = float((y_TH - scale * z_TH).square().sum()) / size
            assert found["scaled"][str(k)] == pytest.approx(left, rel=3e-5, abs=3e-6), (layer, k)
            costly += error > 1e-2
    assert costly >= len(anatomy.moe_layers)


def test_a_budget_costs_what_blocks_of_their_own_k_each_say(taken: Taken) -> None:
    """As runtimes with one number per layer would run it: each router's ``top_k`` set by hand."""
    anatomy = taken.subject.anatomy
    report = by_layer(anatomy, _profile(taken), 1, 1.5)["divided"]
    counts = {int(layer): k for layer, k in report["top_k"].items()}
    assert list(counts) == list(anatomy.moe_layers) and sum(counts.values()) <= 1.5 * len(counts)
    mixed = Stream(taken.source)
    for layer, block in mixed.blocks.items():
        block.router.top_k = counts[layer]
    errors = []
    for layer, (original, others) in observed(taken, [Stream(taken.source), mixed]).items():
        missing = size = 0.0
        for one, other, rows in zip(original, others, taken.rows, strict=True):
            assert other[0].indices.shape[-1] == counts[layer]
            missing += float((other[0].output[rows] - one[0].output[rows]).double().square().sum())
            size += float(one[0].output[rows].double().square().sum())
        errors.append(missing / size)
    assert report["error"] == pytest.approx(np.mean(errors), rel=3e-5, abs=3e-6)
    assert report["error"] <= report["uniform"]["1"] + 1e-9


def test_first_choices_are_where_a_top_1_gate_sends_tokens(taken: Taken) -> None:
    """And the first ranks those of a gate in between, unless a bias takes part in the choice."""
    anatomy = taken.subject.anatomy
    statistics = take_profile(Stream(taken.source), random_corpus().domains, taken.batches)
    has_bias = anatomy.family.router.selection_bias
    streams = [Stream(taken.source), *_retopped(taken)]
    for layer, (_original, *others) in observed(taken, streams).items():
        for k, batches in enumerate(others, start=1):
            loads = np.zeros(anatomy.experts)
            for seen, batch in zip(batches, taken.batches, strict=True):
                for number, window in enumerate(batch.windows):
                    start = number * batch.tokens.shape[1]
                    chosen = seen[0].indices[start : start + len(window.tokens)]
                    loads += np.bincount(chosen.flatten().numpy(), minlength=anatomy.experts)
            said = loads_at(statistics, k, has_bias=has_bias)
            if said is None:
                assert has_bias and 1 < k < anatomy.top_k
                continue
            assert said[anatomy.moe_layers.index(layer)].tolist() == loads.tolist(), (layer, k)
    assert max(batch.tokens.shape[1] for batch in taken.batches) <= LENGTH


def test_domains_count_what_they_weigh(tmp_path: Path) -> None:
    taken = take(checkpoint("deepseek v1", tmp_path / "model"), tmp_path)
    anatomy = taken.subject.anatomy
    found = by_layer(anatomy, _profile(taken, weights={"one": 0.0, "two": 3.0}), 1)
    assert "divided" not in found and "rest on" in found["warnings"][0]
    for layer in anatomy.moe_layers:
        errors = taken.errors(layer, [range(8)], 1, tokens=taken.inner.domain == 1).relative
        assert found["per_layer"][str(layer)]["errors"]["1"] == pytest.approx(errors[0], rel=1e-5)
