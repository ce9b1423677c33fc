"""Streamed training is resident training, step by step, with two layers in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.engine.device import Placement
from moesurgeon.engine.loading import Loader
from moesurgeon.engine.supply import Supply
from moesurgeon.engine.walk import Layer
from moesurgeon.pipeline.subject import Subject
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.result import Training
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.streamed import Streaming, bytes_per_step
from moesurgeon.recovery.targets import Adapt
from tests.engine.small import saved, small_model
from tests.laws.sides import PIECE, Side, assert_same_steps, batches, cached_of, other_routing, side, text_for

EVERYTHING = Losses(router=0.5, hidden=0.3, lm=0.2, z=0.01, balance=0.1, temperature=1.5)
ADAPT: list[tuple[Adapt, ...]] = [("routers",), ("full-routers",), ("experts",), ("full-routers", "experts-all")]


def training_of(adapt: tuple[Adapt, ...], losses: Losses = EVERYTHING, **changes: Any) -> Training:
    return Training(adapt=adapt, losses=losses, schedule=Schedule(rank=2, **changes), length=40)


# ---- step by step ----


@pytest.mark.parametrize("is_cached", [False, True], ids=["shared", "cached"])
@pytest.mark.parametrize("adapt", ADAPT, ids="+".join)
def test_a_streamed_step_is_a_resident_one(
    adapt: tuple[Adapt, ...], is_cached: bool, tiny: Subject, tmp_path: Path
) -> None:
    """In pieces of two or three windows, padded, with every term there is."""
    training, corpus = training_of(adapt), text_for(tiny)
    teacher = cached_of(tiny, tmp_path / "said", corpus, training) if is_cached else other_routing(tiny.anatomy)
    with (
        side(tiny, training, teacher, None) as resident,
        side(tiny, training, teacher, Streaming(tmp_path / "best", piece=PIECE)) as streamed,
    ):
        assert_same_steps(resident, streamed, training, batches(tiny, corpus, 3))
        _assert_same_state(resident, streamed)


def _assert_same_state(resident: Side, streamed: Side) -> None:
    """From the same state: the same bits are stored, and judged alike as they are and as they will be written."""
    streamed.adapted.load(resident.adapted.state())
    parts, same = (each.steps.stored(("routers", "experts")) for each in (resident, streamed))
    assert list(parts) == list(same)
    for name, tensor in same.items():
        assert tensor.dtype == parts[name].dtype
        assert torch.equal(tensor, parts[name])
    for given in ((("routers", "experts"),), ((), parts), ((),)):
        mine, theirs = (each.steps.judged(*given) for each in (resident, streamed))
        assert theirs.loss == pytest.approx(mine.loss, rel=1e-6)
        assert (mine.counts == theirs.counts).all()


def test_adalora_trains_alike_and_keeps_the_same_ranks(tiny: Subject, tmp_path: Path) -> None:
    """The Linear child of every router has the weight that was read."""
    training = replace(training_of(("routers",), steps=20), adapter="adalora")
    corpus, teacher = text_for(tiny), other_routing(tiny.anatomy)
    with (
        side(tiny, training, teacher, None) as resident,
        side(tiny, training, teacher, Streaming(tmp_path / "best", piece=PIECE)) as streamed,
    ):
        assert_same_steps(resident, streamed, training, batches(tiny, corpus, 3))
        _assert_same_state(resident, streamed)
        for each in (resident, streamed):
            each.steps.gradients(batches(tiny, corpus, 1)[0], None)
            for step in range(15):
                each.adapted.allocate(step)
        ranks = resident.adapted.ranks()
        assert ranks == streamed.adapted.ranks() and ranks is not None
        assert sum(ranks.values()) < 3 * len(ranks)


OTHERS: dict[str, tuple[str, dict[str, Any], Losses, dict[str, Any]]] = {
    "tied embeddings": ("mixtral", {"tie_word_embeddings": True}, EVERYTHING, {}),
    "groups, bias, latent attention, dense first layer": ("deepseek_v3", {}, EVERYTHING, {}),
    "a gated shared expert": ("qwen2_moe", {}, EVERYTHING, {}),
    # Whom it drops depends on all of the batch, which goes through whole then.
    "capacity": ("mixtral", {}, EVERYTHING, {"capacity": 1.0}),
    "two candidates": ("mixtral", {"num_experts_per_tok": 1}, EVERYTHING, {"candidates": 2}),
    "the plain loss": ("deepseek_v1", {}, Losses(objective="lm"), {}),
    "the plain loss and a teacher's routers": ("deepseek_v1", {}, Losses(objective="lm", router=1.0), {}),
}


@pytest.mark.parametrize(("family", "changes", "losses", "schedule"), OTHERS.values(), ids=OTHERS.keys())
def test_so_it_is_in_other_families_and_with_other_objectives(
    family: str, changes: dict[str, Any], losses: Losses, schedule: dict[str, Any], tmp_path: Path
) -> None:
    subject = saved(small_model(family, **changes), tmp_path / "model")
    training, teacher = training_of(("routers", "experts"), losses, **schedule), other_routing(subject.anatomy)
    with (
        side(subject, training, teacher, None) as resident,
        side(subject, training, teacher, Streaming(tmp_path / "best", piece=PIECE)) as streamed,
    ):
        assert_same_steps(resident, streamed, training, batches(subject, text_for(subject), 2))


def test_in_bfloat16_masters_are_float32_and_gradients_those_of_the_whole_batch(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral").to(torch.bfloat16), tmp_path / "model")
    training, teacher = training_of(("full-routers", "experts"), Losses()), other_routing(subject.anatomy)
    placement = Placement(torch.device("cpu"), torch.bfloat16)
    with (
        side(subject, training, teacher, None, placement) as resident,
        side(subject, training, teacher, Streaming(tmp_path / "best"), placement) as streamed,
    ):
        assert {weight.dtype for weight in streamed.adapted.weights()} == {torch.float32}
        # What is zero for the hard choice adds to the rounding of sums in bfloat16.
        assert_same_steps(resident, streamed, training, batches(subject, text_for(subject), 2), rtol=2e-2)


def test_states_in_files_give_the_same_bits(tmp_path: Path) -> None:
    subject = saved(small_model("deepseek_v3"), tmp_path / "model")
    training, teacher = training_of(("routers", "experts")), other_routing(subject.anatomy)
    (tmp_path / "states").mkdir()
    with (
        side(subject, training, teacher, Streaming(tmp_path / "best", piece=PIECE)) as held,
        side(subject, training, teacher, Streaming(tmp_path / "best", tmp_path / "states", PIECE)) as filed,
    ):
        for batch in batches(subject, text_for(subject), 2):
            figures = [each.steps.gradients(batch, None).figures for each in (held, filed)]
            assert figures[0] == figures[1]
            for mine, theirs in zip(held.gradients(), filed.gradients(), strict=True):
                assert torch.equal(mine, theirs)
        assert filed.steps.judged(("routers",)).loss == held.steps.judged(("routers",)).loss
        assert {path.name for path in (tmp_path / "states").iterdir()} >= {"0.hidden", "1.input", "gradient"}


# ---- beyond memory ----


def test_two_layers_are_in_memory_and_the_rest_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = saved(small_model("mixtral", num_hidden_layers=6), tmp_path / "model")
    training, teacher = training_of(("routers", "experts")), other_routing(subject.anatomy)
    memories: list[torch.Tensor] = []
    make, run, read = Supply._memory, Layer._prepared, Loader._read_into
    read_bytes, most = [0], [0]

    def made(self: Supply, size: int, device: torch.device) -> torch.Tensor:
        memories.append(make(self, size, device))
        return memories[-1]

    def noted(self: Layer, *given: Any) -> Any:
        skeleton = self.walk.streams[0].skeleton
        with_weights = {
            number
            for number in range(6)
            for name in skeleton.names_of_layer(number)
            if not _held(skeleton.modules, name).is_meta
        }
        most[0] = max(most[0], len(with_weights))
        assert with_weights == {self.number}
        return run(self, *given)

    def counted(self: Loader, spec: Any, start: int, memory: torch.Tensor) -> None:
        read_bytes[0] += memory.numel()
        read(self, spec, start, memory)

    monkeypatch.setattr(Supply, "_memory", made)
    monkeypatch.setattr(Layer, "_prepared", noted)
    monkeypatch.setattr(Loader, "_read_into", counted)
    with side(subject, training, teacher, Streaming(tmp_path / "best", piece=PIECE)) as streamed:
        for batch in batches(subject, text_for(subject), 2):
            read_bytes[0] = 0
            streamed.steps.gradients(batch, None)
            assert read_bytes[0] == bytes_per_step(streamed.source)
        streamed.steps.judged(("routers", "experts"))
        assert most == [1]
        assert len(memories) == 2  # slots of one layer each, and nothing else was ever made for weights
        stored = sum(spec.nbytes for spec in subject.anatomy.tensors.values())
        ends = sum(spec.nbytes for name, spec in subject.anatomy.tensors.items() if ".layers." not in name)
        assert bytes_per_step(streamed.source) == 2 * stored - ends  # embedding, norm and head once
        streamed.source.supply.allow(sum(streamed.source.supply._sizes))
        assert bytes_per_step(streamed.source) == 0


def _held(modules: Any, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    module = modules[path]
    parametrized = getattr(module, "parametrizations", {})
    held: torch.Tensor = parametrized[last].original if last in parametrized else getattr(module, last)
    return held
