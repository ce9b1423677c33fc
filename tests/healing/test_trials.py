"""Trials of subsets against what really cutting and refitting gives, and the choice against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.errors import CheckpointError
from moesurgeon.healing.block import error_of, own_values
from moesurgeon.healing.bound import bare_errors, inner_of
from moesurgeon.healing.memory import trial_bytes
from moesurgeon.healing.ridge import refitted
from moesurgeon.healing.sample import Sample, take_sample
from moesurgeon.healing.trials import Trials
from moesurgeon.pipeline.healed_choice import LayerChoice, Starts, choose_healed
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.profiling.sample import Rows, sampled_rows
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import plan_prune, with_mtp_layers
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.engine.small import source_of
from tests.families.conftest import Stock
from tests.families.factory import put_nan, save_checkpoint
from tests.healing.cases import HELD, LEARN, stopped

# A softmax, one with shared experts, groups with a selection bias, a gate on the shared expert, a residual factor.
NAMES = ("mixtral", "deepseek", "deepseek_v3", "qwen2_moe", "granitemoe")
SUBSETS = {1: [(0, 2, 3, 5, 6, 7), (0, 1, 2, 3, 4, 5), (1, 2, 4, 5, 6, 7)], 2: [(0, 2, 3, 5, 6, 7), (0, 1, 2, 4, 5, 7)]}


def _every(batches: Sequence[Batch]) -> list[Rows]:
    return sampled_rows(batches, 10**6)


@contextmanager
def _sampled(
    subject: Subject, *, which: int = 0, plan: EditPlan | None = None
) -> Iterator[tuple[Stream, int, Sample, Sample]]:
    """Walk to mixture layer number ``which`` and give the stream, the layer and all of its tokens.

    With a ``plan`` that is what walks, with the checkpoint as its teacher.
    """
    source = source_of(subject)
    teacher = Stream(source) if plan else None
    stream = Stream(source, Overlay(plan=plan) if plan else None)
    walk = Walk([each for each in (teacher, stream) if each], [*LEARN, *HELD])
    sets = (range(len(LEARN)), LEARN), (range(len(LEARN), len(LEARN) + len(HELD)), HELD)
    with closing(walk.layers()) as layers:
        for layer in layers:
            if teacher:
                for number in range(len(walk.batches)):
                    layer.move(teacher, number)
            if layer.number == subject.anatomy.moe_layers[which]:
                train, held = (take_sample(layer, stream, teacher, numbers, _every(each)) for numbers, each in sets)
                yield stream, layer.number, train, held
                return
            for number in range(len(walk.batches)):
                layer.move(stream, number)


def _trials(stream: Stream, layer: int, train: Sample, held: Sample, **options: int) -> Trials:
    anatomy = stream.anatomy
    return Trials(stream.blocks[layer], routing_of(anatomy), anatomy.top_k, train, held, **options)


def _cut(subject: Subject, kept: Sequence[int]) -> EditPlan:
    return plan_prune(
        subject.anatomy, with_mtp_layers(subject.anatomy, dict.fromkeys(subject.anatomy.moe_layers, tuple(kept)))
    )


def _really(subject: Subject, kept: Sequence[int]) -> tuple[float, float]:
    """Return the errors on held-out tokens of the first mixture layer, cut and refitted as healing does it.

    What is before that layer is not cut, so that its inputs are the checkpoint's and its target what the block gave.
    """
    with stopped(subject, _cut(subject, kept)) as stop:
        own = own_values(stop.block)
        found = refitted(stop.block, stop.train, stop.heldout)
        return error_of(stop.block, own, stop.heldout), error_of(stop.block, own | found, stop.heldout)


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_is_a_cut_and_its_refit(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    with _sampled(subject) as sampled:
        trials, without_cache = _trials(*sampled), _trials(*sampled, cache=0)
        for kept in SUBSETS[subject.anatomy.groups[0]]:
            found, (bare, healed) = trials(kept), _really(subject, kept)
            assert found.bare == pytest.approx(bare, rel=1e-4)
            assert found.healed == pytest.approx(healed, rel=2e-3) and found.healed < found.bare
            assert without_cache(kept) == found
            assert trials(kept) == found  # nothing of an earlier trial stays


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_the_error_of_the_cut(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    with _sampled(subject) as (stream, layer, train, held):
        block, routing, top_k = stream.blocks[layer], routing_of(stream.anatomy), stream.anatomy.top_k
        errors = bare_errors(inner_of(block, routing, top_k, held), routing, top_k)
        subsets = SUBSETS[subject.anatomy.groups[0]]
        kept = np.array([[expert in subset for expert in range(8)] for subset in subsets])
        trials = _trials(stream, layer, train, held)
        expected = [trials(subset).bare * held.square / len(held) for subset in subsets]
        assert errors(kept) == pytest.approx(expected, rel=1e-4)
        # One that cannot run is the worst, not the end.
        kept[0] = False
        assert np.isnan(errors(kept)).tolist() == [True] + [False] * (len(subsets) - 1)


def test_a_teacher_sets_the_target(stock: Stock) -> None:
    """What was cut before is part of what is missing, as it is for healing."""
    subject = open_subject(str(stock("granitemoe")))
    plan = plan_retop(subject.anatomy, RetopSpec(top_k=1))
    with _sampled(subject, which=2, plan=plan) as sampled, stopped(subject, plan, which=2) as stop:
        stream, layer, train, held = sampled
        found = _trials(*sampled)(range(8))
        assert found.bare == pytest.approx(error_of(stop.block, own_values(stop.block), stop.heldout), rel=1e-4)
        values = own_values(stop.block) | refitted(stop.block, stop.train, stop.heldout)
        assert found.healed == pytest.approx(error_of(stop.block, values, stop.heldout), rel=2e-3)
        assert torch.equal(train.inputs, stop.train.inputs) and len(held) == len(stop.heldout)
        assert stream.blocks[layer].layer == subject.anatomy.moe_layers[2]


def _chosen(
    subject: Subject,
    count: int,
    *,
    fixed: dict[int, frozenset[int]] | None = None,
    starts: Starts | None = None,
    few: int = 64,
    folder: Path | None = None,
) -> dict[int, LayerChoice]:
    stream = Stream(source_of(subject))
    if folder is not None:
        stream.source.supply.allow(stream.source.supply.least)
    walk = Walk([stream], [*LEARN, *HELD], folder)
    learn, held = range(len(LEARN)), range(len(LEARN), len(walk.batches))
    return choose_healed(walk, stream, learn, held, count, fixed=fixed, starts=starts, few=few)


@pytest.mark.parametrize(
    ("name", "count", "fixed"), [("mixtral", 6, (1, 4, 5)), ("deepseek_v3", 6, ()), ("deepseek", 7, ())]
)
def test_the_choice_is_that_of_brute_force(name: str, count: int, fixed: tuple[int, ...], stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    groups, first = subject.anatomy.groups[0], subject.anatomy.moe_layers[0]
    found = _chosen(subject, count, fixed={first: frozenset(fixed)})
    assert tuple(found) == subject.anatomy.moe_layers and all(each.exact for each in found.values())
    allowed = [
        kept
        for kept in itertools.combinations(range(8), count)
        if set(fixed) <= set(kept) and len({sum(e // (8 // groups) == g for e in kept) for g in range(groups)}) == 1
    ]
    errors = {kept: _really(subject, kept)[1] for kept in allowed}
    mine = found[first]
    assert mine.refitted == len(allowed) and mine.kept in errors
    # Sums are float32 here: of two that are as good either may be taken.
    assert errors[mine.kept] == pytest.approx(min(errors.values()), rel=2e-3)
    assert mine.left.healed == pytest.approx(errors[mine.kept], rel=2e-3)


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "deepseek_v3"])
def test_a_search_finds_what_all_trials_find(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    layers = subject.anatomy.moe_layers
    starts = {layer: {"one": (0, 1, 2, 4, 5, 6), "other": (0, 1, 3, 4, 5, 7)} for layer in layers}
    fixed = {layers[-1]: frozenset({2, 7})}
    every, some = (_chosen(subject, 6, starts=starts, fixed=fixed, few=few) for few in (64, 1))
    same = 0
    for layer in layers:
        assert every[layer].exact and not some[layer].exact and some[layer].refitted <= every[layer].refitted
        assert fixed.get(layer, frozenset()) <= set(some[layer].kept)
        if layer not in fixed:  # which the choices of others need not hold
            assert all(some[layer].left.healed <= left.healed for _kept, left in some[layer].others.values())
        assert every[layer].left.healed <= some[layer].left.healed
        same += every[layer].kept == some[layer].kept
    assert same >= len(layers) - 1


def test_with_layers_read_one_by_one_the_same_is_chosen(stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(stock("deepseek")))
    assert _chosen(subject, 7, folder=tmp_path) == _chosen(subject, 7)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "mixtral")
    subject = open_subject(str(source))
    put_nan(source, subject.anatomy.router_weight(1).replace("gate", "experts.0.w1"))
    with pytest.raises(CheckpointError, match="layer 1: hidden states are not finite"):
        _chosen(open_subject(str(source)), 7)


def test_what_trials_take_is_known_before(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is counted as far as it is kept."""
    for name in ("_INNER", "_SUBSETS"):
        monkeypatch.setattr(f"moesurgeon.healing.memory.{name}", 0)
    stream = Stream(source_of(open_subject(str(stock("deepseek")))))
    wide, hidden, tokens = 64, 64, 1000  # of the two shared experts together
    most = trial_bytes(stream, tokens)
    expected = 4 * tokens * (3 * hidden + 3 * 8 + 8 * 9 + 8 * wide + 4 * wide) + 9 * 7 * wide**2 * 4
    assert most == expected
    monkeypatch.setattr("moesurgeon.healing.trials.CACHE", 0)
    assert trial_bytes(stream, tokens) == expected - 8 * (4 * tokens * wide + 7 * wide**2 * 4)
