"""Experts out of reach are as good as gone: the same choice, the same logits; and where their tokens go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.pipeline.explained import explain_choice
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.profiling.all_experts import AllExperts, InnerSpec, rule_of
from moesurgeon.profiling.artefact import Profile
from moesurgeon.profiling.inner import Inner
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.virtual import plan_virtual
from tests.engine.small import source_of, stream_of
from tests.families.conftest import Stock
from tests.laws.test_overlay import KEPT
from tests.laws.walks import BY_TYPE, LAYOUTS, routed, same, text
from tests.profiling.made import profile_of

BIASED = [name for name in LAYOUTS if BY_TYPE[name.split()[0]].router.selection_bias]
# Its scores are a softmax: without an expert those of all others grow, and the bias weighs less.
SIGMOID = [name for name in BIASED if BY_TYPE[name.split()[0]].router.scoring == "sigmoid"]
# In two groups two at least, another number in every layer.
UNEVEN = {0: (0, 2, 5, 6, 7), 1: (0, 1, 2, 5, 6), 2: (1, 2, 3, 4, 6, 7), 3: (0, 3, 4, 5)}


BATCHES = [text(24, 24), text(40, 40, 40)]


def _for(subject: Subject, kept: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    return {layer: kept[layer] for layer in subject.anatomy.moe_layers}


def _dropped(kept: Mapping[int, tuple[int, ...]]) -> dict[int, frozenset[int]]:
    return {layer: frozenset(range(8)) - set(experts) for layer, experts in kept.items()}


@pytest.mark.parametrize("name", SIGMOID)
def test_out_of_reach_is_masked_to_the_last_bit(name: str, stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(stock(name)))
    kept = _for(subject, UNEVEN)
    source, plan = source_of(subject), plan_virtual(subject.anatomy, kept)
    logits, chosen = routed(Stream(source, Overlay(plan=plan)), BATCHES)
    expected, masked = routed(Stream(source, Overlay(masked=_dropped(kept))), BATCHES)
    assert same(logits, expected)
    for layer in kept:
        assert same(chosen[layer], masked[layer])
        assert set(torch.cat(chosen[layer]).unique().tolist()) <= set(kept[layer])
    assert not same(logits, routed(Stream(source), BATCHES)[0])
    apply(plan, subject.checkpoint, tmp_path / "out")
    assert same(routed(stream_of(open_subject(str(tmp_path / "out"))), BATCHES)[0], logits)


@pytest.mark.parametrize("name", SIGMOID)
def test_with_equal_counts_it_is_the_pruned_checkpoint(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    kept = _for(subject, KEPT)
    source = source_of(subject)
    logits, chosen = routed(Stream(source, Overlay(plan=plan_virtual(subject.anatomy, kept))), BATCHES)
    expected, renumbered = routed(Stream(source, Overlay(plan=plan_prune(subject.anatomy, kept))), BATCHES)
    for layer, experts in kept.items():
        for mine, theirs in zip(chosen[layer], renumbered[layer], strict=True):
            assert torch.equal(mine, torch.tensor(experts)[theirs]), layer
    for mine, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))


def test_of_a_softmax_the_scores_stay_those_of_all(stock: Stock) -> None:
    """ERNIE 4.5: nobody is given to who is out of reach, the best of the others by score plus bias take the place."""
    subject = open_subject(str(stock("ernie4_5_moe")))
    kept = _for(subject, UNEVEN)
    stream = Stream(source_of(subject), Overlay(plan=plan_virtual(subject.anatomy, kept)))
    _logits, chosen = routed(stream, BATCHES)
    for layer, experts in kept.items():
        assert set(torch.cat(chosen[layer]).unique().tolist()) == set(experts)


@pytest.mark.parametrize(
    ("name", "virtual"),
    [(name, False) for name in ("deepseek_v3", "ernie4_5_moe", "mixtral", "deepseek_v2")]
    + [(name, True) for name in ("deepseek_v3", "ernie4_5_moe")],
)
def test_where_tokens_go_is_what_the_edited_checkpoint_routes(
    name: str, virtual: bool, stock: Stock, tmp_path: Path
) -> None:
    """From stored logits alone, against the first layer of the edited checkpoint, which gets the same inputs."""
    subject = open_subject(str(stock(name)))
    kept = _for(subject, KEPT)
    profile = _profiled(subject, tmp_path)
    source = source_of(subject)
    _logits, before = routed(Stream(source), BATCHES)
    plan = plan_virtual(subject.anatomy, kept) if virtual else plan_prune(subject.anatomy, kept)
    _logits, after = routed(Stream(source, Overlay(plan=plan)), BATCHES)
    layer = subject.anatomy.moe_layers[0]
    numbers = torch.arange(8) if virtual else torch.tensor(kept[layer])
    moved = np.zeros((8, 8))
    for was, is_now in zip(torch.cat(before[layer]).tolist(), numbers[torch.cat(after[layer])].tolist(), strict=True):
        came = set(is_now) - set(was)
        for left in set(was) - set(is_now):
            for other in came:
                moved[left, other] += 1 / len(came)
    report = explain_choice(subject.anatomy, profile, kept, "reap", virtual=virtual)
    assert report["destinations"] == {"from": "inner", "tokens": len(torch.cat(before[layer]))}
    entries = report["explained"][str(layer)]
    assert [entry["expert"] for entry in sorted(entries, key=lambda entry: entry["expert"])] == sorted(
        _dropped(kept)[layer]
    )
    for entry in entries:
        to = moved[entry["expert"]]
        assert entry["tokens"] == round(to.sum()) > 0
        most = sorted((other for other in range(8) if to[other]), key=lambda other: (-to[other], other))[:4]
        assert sorted(place["share"] for place in entry["goes_to"]) == pytest.approx(sorted(to[most] / to.sum()))
        for place in entry["goes_to"]:
            assert place["share"] == pytest.approx(to[place["expert"]] / to.sum())


def _profiled(subject: Subject, folder: Path) -> Profile:
    """Return a profile of all tokens of ``BATCHES``, with their inner products."""
    spec, path = InnerSpec(tokens=10_000), folder / "inner.safetensors"
    extra = AllExperts(subject.anatomy, ("text",), BATCHES, spec, path)
    extra.open()
    statistics = take_profile(Stream(source_of(subject)), ("text",), BATCHES, extras=(extra,))
    profile = profile_of(statistics)
    return replace(profile, inner=Inner.open(path, extra.shape, rule_of(subject.anatomy)))
