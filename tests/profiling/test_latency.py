"""Latency: what is measured, and what a profile says of it. No test depends on how fast anything is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import moe_blocks
from moesurgeon.engine.observe import expert_outputs
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import ProfileError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.profiling.artefact import Origin, Profile, load_profile, save_profile
from moesurgeon.profiling.latency import Latency, repeated, run_expert
from moesurgeon.profiling.latency_facts import latency_summary, merged_latency
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.profiling.statistics import Statistics
from tests.engine.small import batches_for, corpus_of, random_windows, running, source_of

CPU = Placement(torch.device("cpu"), torch.float32)
ORIGIN = Origin(
    fingerprint="f" * 64, family="mixtral", splits={}, trace_hashes={}, length=8, placement="cpu", transformers="5"
)  # fmt: skip
FACTS: dict[str, Any] = {
    "device": "cpu, 1 threads",
    "dtype": "float32",
    "tokens": [1, 2, 4],
    "p50": [1.0, 1.0, 2.0],
    "p95": [1.0, 1.5, 2.5],
    "p99": [1.0, 1.5, 3.0],
    "knots": [[1.0, 1.0], [2.0, 1.0], [4.0, 2.0]],
    "block": {"1": {"measured_ms": 5.0, "predicted_ms": 4.0}},
}


def test_experts_and_blocks_are_timed_on_the_way(tiny: Subject) -> None:
    vocabulary = int(tiny.checkpoint.config["vocab_size"])
    corpus = corpus_of(random_windows("one", count=9, vocabulary=vocabulary, longest=40))
    batches = batches_for(corpus, 40, rows=2)
    latency = Latency(tiny.anatomy, batches, seconds=0.05)
    plain = take_profile(Stream(source_of(tiny)), corpus.domains, batches)
    taken = take_profile(Stream(source_of(tiny)), corpus.domains, batches, extras=[latency])
    assert all(np.array_equal(taken.sums[name], array) for name, array in plain.sums.items())
    facts = latency.facts(torch.device("cpu"), torch.float32)
    largest = max(batch.text_tokens for batch in batches)
    assert facts["tokens"] == [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= largest]
    assert facts["device"].startswith("cpu, ") and facts["dtype"] == "float32"
    for low, middle, high in zip(facts["p50"], facts["p95"], facts["p99"], strict=True):
        assert 0 < low <= middle <= high
    assert set(facts["block"]) == set(map(str, tiny.anatomy.moe_layers))
    assert all(times["measured_ms"] > 0 and times["predicted_ms"] > 0 for times in facts["block"].values())
    # The loads are those that the blocks computed, padding included.
    positions = sorted(batch.tokens.numel() * tiny.anatomy.top_k for batch in batches)
    assert set(latency.arrays["latency.loads"].sum(axis=2).flatten().tolist()) <= set(map(float, positions))
    profile = Profile(taken, ORIGIN, latency=facts)
    report = profile.summary()["latency"]
    assert {name: report[name] for name in facts} == facts


def test_only_the_first_process_measures(tiny: Subject) -> None:
    corpus = corpus_of(random_windows("one", count=14, vocabulary=96, longest=40))
    batches = batches_for(corpus, 40, rows=2)
    second = Latency(tiny.anatomy, batches, Ranks(1, 2))
    assert all(second.visitor(number) is None for number in range(len(batches)))
    first = Latency(tiny.anatomy, batches, Ranks(0, 2))
    looked = [number for number in range(len(batches)) if first.visitor(number)]
    assert looked and all(number % 2 == 0 for number in looked)
    assert {name: each.shape for name, each in first.arrays.items()} == {
        name: each.shape for name, each in second.arrays.items()
    }


def test_what_is_timed_is_what_an_expert_does(tiny_mixtral: Subject) -> None:
    block = moe_blocks(running(tiny_mixtral), tiny_mixtral.anatomy)[1]
    inputs = torch.randn(6, tiny_mixtral.anatomy.hidden, generator=torch.Generator().manual_seed(0))
    for tokens, repeat in ((4, 3), (6, 9)):
        with torch.no_grad():
            found = run_expert(block, inputs, tokens, repeat)()
            expert, _, _, outputs = next(
                expert_outputs(block.experts, inputs[:tokens], torch.full((tokens, 1), repeat % 8))
            )
        assert expert == repeat % 8
        torch.testing.assert_close(found[:tokens], 0.5 * outputs)
        assert not found[tokens:].any()


class Clock:
    """Time that passes as it is told: a second for each token, the first run of each count twice that."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []

    def run(self, count: int, repeat: int) -> Callable[[], object]:
        self.runs.append((count, repeat))
        return lambda: None

    def clocked(self, _work: Callable[[], object]) -> float:
        count, repeat = self.runs[-1]
        return float(count) if repeat else 2.0 * count


def test_counts_take_turns_and_the_first_turn_is_thrown_away() -> None:
    clock = Clock()
    taken = repeated(clock.run, (1, 2, 4), 70.0, clock.clocked)
    assert taken == [[1.0] * 10, [2.0] * 10, [4.0] * 10]  # 10 turns of 7 seconds
    assert clock.runs == [(count, repeat) for repeat in range(11) for count in (1, 2, 4)]


def test_what_would_take_too_long_is_left_out() -> None:
    clock = Clock()
    taken = repeated(clock.run, (1, 2, 4, 8, 16), 250.0, clock.clocked)
    assert [bool(times) for times in taken] == [True] * 4 + [False]
    assert clock.runs[4] == (16, 0) and (16, 1) not in clock.runs
    # However little time there is, three counts are measured, seven times each.
    clock = Clock()
    assert [len(times) for times in repeated(clock.run, (1, 2, 4, 8), 0.0, clock.clocked)] == [7, 7, 7, 0]


def _statistics() -> Statistics:
    statistics = Statistics.empty(("one",), (1,), 4, 2)
    statistics.sums["tokens"][0, 0, 0] = [40, 30, 20, 10]
    statistics.sums["dispatch"][0, 0, 0] = [10, 60, 0, 100]  # of 512: ten with 10 choices, largest loads add up to 60
    return statistics


def test_each_expert_has_its_milliseconds_from_its_load_in_a_dispatch() -> None:
    found = latency_summary(FACTS, _statistics())["experts"]
    # Loads 4, 3, 2, 1; the largest is 6 on average, even is 2.5.
    assert found == {"1": {"512": {"milliseconds": [2.0, 1.5, 1.0, 1.0], "straggler_ms": 3.0, "even_ms": 1.25}}}


def test_a_profile_keeps_it_and_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    save_profile(Profile(_statistics(), ORIGIN, latency=FACTS), tmp_path / "profile")
    assert load_profile(tmp_path / "profile").latency == FACTS
    save_profile(Profile(_statistics(), ORIGIN), tmp_path / "none")
    assert load_profile(tmp_path / "none").latency is None


@pytest.mark.parametrize(
    "change",
    [
        {"p50": [1.0, 2.0]},
        {"p99": [1.0, 0.0, 1.0]},
        {"tokens": None},
        {"knots": [[1.0, 1.0], [2.0, 0.5]]},
        {"knots": [[1.0, 1.0], [1.0, 2.0]]},
        {"knots": []},
        {"knots": [[1.0, float("inf")]]},
        {"block": {"2": {"measured_ms": 1.0, "predicted_ms": 1.0}}},
        {"block": {"1": {"measured_ms": 1.0}}},
        {"block": []},
    ],
    ids=str,
)
def test_latency_that_makes_no_sense_is_damage(change: dict[str, Any], tmp_path: Path) -> None:
    save_profile(Profile(_statistics(), ORIGIN, latency={**FACTS, **change}), tmp_path / "profile")
    with pytest.raises(ProfileError, match="damaged"):
        load_profile(tmp_path / "profile")


def test_merging_keeps_the_first_ones_of_one_device() -> None:
    other = {**FACTS, "p50": [2.0, 2.0, 4.0]}
    assert merged_latency(FACTS, other) == (FACTS, None)
    assert merged_latency(None, FACTS) == (FACTS, None)
    assert merged_latency(FACTS, None) == (FACTS, None)
    assert merged_latency(None, None) == (None, None)
    merged, note = merged_latency(FACTS, {**FACTS, "device": "NVIDIA H100"})
    assert merged is None
    assert note is not None and "cpu, 1 threads float32 and NVIDIA H100 float32" in note and "--latency" in note
