"""Streams share what they do not change, read it once, and may change while they walk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moesurgeon.engine.loading import Loader
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.engine.small import VOCABULARY, running, saved, small_model, source_of, stream_of
from tests.laws.walks import same, text, walked

BATCHES = [text(24, 17), text(20, 20)]


@contextmanager
def _bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count, by tensor, the bytes that come from disk."""
    counts: dict[str, int] = {}
    read = Loader._read_into

    def counted(self: Loader, spec: object, start: int, memory: torch.Tensor) -> None:
        counts[spec.name] = counts.get(spec.name, 0) + memory.numel()  # type: ignore[attr-defined]
        read(self, spec, start, memory)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "_read_into", counted)
        yield counts


def _every_kind(subject: Subject, source: Source) -> list[Stream]:
    anatomy = subject.anatomy
    first = anatomy.moe_layers[0]
    router = f"model.layers.{first}.mlp.gate.weight"
    overlays = [
        Overlay(),
        Overlay(plan=plan_retop(anatomy, RetopSpec(top_k=1))),
        Overlay(plan=plan_prune(anatomy, dict.fromkeys(anatomy.moe_layers, tuple(range(anatomy.experts))[::2]))),
        Overlay(masked={first: frozenset({1})}),
        Overlay(tensors={router: torch.zeros(source.skeleton.targets[router].shape)}),
    ]
    return [Stream(source, overlay) for overlay in overlays]


@pytest.mark.parametrize("limited", [False, True], ids=["resident", "streamed"])
def test_every_byte_is_read_once_however_many_walk(
    limited: bool, tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tiny)
    if limited:
        source.supply.allow(source.supply.least)
    with _bytes_read(monkeypatch) as counts:
        walked(_every_kind(tiny, source), BATCHES)
        assert counts == {name: tensor.nbytes for name, tensor in tiny.checkpoint.tensors.items()}
        walked([Stream(source)], BATCHES)
        again = {name: count - tiny.checkpoint.tensors[name].nbytes for name, count in counts.items()}
    expected = {name: tensor.nbytes if limited else 0 for name, tensor in tiny.checkpoint.tensors.items()}
    assert again == {name: 0 if _is_kept(source, name) else size for name, size in expected.items()}


def _is_kept(source: Source, stored: str) -> bool:
    target = source.destinations.target_of[stored][0]
    return any(target in source.supply._groups[group] for group in source.supply.plan.kept)


def test_what_an_overlay_leaves_alone_is_shared(tiny: Subject) -> None:
    """To the address: N streams cost the memory of one and of what they change."""
    source = source_of(tiny)
    plain, retop, pruned, masked, _replaced = streams = _every_kind(tiny, source)
    first = tiny.anatomy.moe_layers[0]
    gate = f"model.layers.{first}.mlp.gate.weight"
    for layer in Walk(streams, BATCHES).layers():
        read = layer.read[source]
        for stream in streams:
            own = {
                name
                for name, tensor in stream.skeleton.model.state_dict().items()
                if not tensor.is_meta and tensor.data_ptr() != read[name].data_ptr()
            }
            if layer.number not in tiny.anatomy.moe_layers or stream in (plain, retop, masked):
                assert own == set()
            elif stream is pruned:
                block = f"model.layers.{layer.number}.mlp."
                assert own == {f"{block}gate.weight", f"{block}experts.gate_up_proj", f"{block}experts.down_proj"}
            else:
                assert own == ({gate} if layer.number == first else set())
            filled = {name for name, tensor in stream.skeleton.model.state_dict().items() if not tensor.is_meta}
            assert filled == set(source.skeleton.names_of_layer(layer.number))  # of no other layer
    for stream in streams:  # and at the end nobody holds anything
        assert all(tensor.is_meta for tensor in stream.skeleton.model.state_dict().values())


def _expected(subject: Subject, changed_from: int, weight: torch.Tensor) -> list[list[torch.Tensor]]:
    """Return per batch the logits without and with another router in layer ``changed_from``."""
    name = f"model.layers.{changed_from}.mlp.gate.weight"
    source = source_of(subject)
    streams = [Stream(source), Stream(source, Overlay(tensors={name: weight}))]
    before, after = walked(streams, BATCHES)
    assert not same(before, after)
    return [list(pair) for pair in zip(before, after, strict=True)]


def test_a_change_on_the_way_counts_from_there_on(tiny: Subject) -> None:
    """Of a layer after some of its batches: for those that follow, and for its streams alone."""
    number = tiny.anatomy.moe_layers[1]
    name = f"model.layers.{number}.mlp.gate.weight"
    source = source_of(tiny)
    weight = torch.randn(source.skeleton.targets[name].shape, generator=torch.Generator().manual_seed(0))
    expected = _expected(tiny, number, weight)
    stream, beside = Stream(source), Stream(source)
    walk = Walk([stream, beside], BATCHES)
    for layer in walk.layers():
        for one, batch in walk.moving(layer):
            if layer.number == number and batch == 1 and one is stream:
                stream.overlay.tensors[name] = weight
                layer.rebind(stream, name)
            layer.move(one, batch)
    stream.overlay.tensors["model.layers.0.input_layernorm.weight"] = weight[0]  # what is behind it is behind it
    for tail in walk.tail():
        found = [[tail.logits(one, batch, 0, shape.tokens.shape[1]) for batch, shape in enumerate(BATCHES)]
                 for one in (stream, beside)]  # fmt: skip
    assert same(found[0], [expected[0][0], expected[1][1]])
    assert same(found[1], [before for before, _ in expected])


def test_a_change_may_be_taken_back(tiny: Subject) -> None:
    number = tiny.anatomy.moe_layers[0]
    name = f"model.layers.{number}.mlp.experts.down_proj"
    source = source_of(tiny)
    stream = Stream(source)
    walk = Walk([stream], BATCHES)
    for layer in walk.layers():
        if layer.number == number:
            before = layer.forward(stream, 0)
            stream.overlay.tensors[name] = torch.zeros(source.skeleton.targets[name].shape)
            layer.rebind(stream, name)
            assert not torch.equal(layer.forward(stream, 0), before)
            del stream.overlay.tensors[name]
            layer.rebind(stream, name)
            assert torch.equal(layer.forward(stream, 0), before)
        for one, batch in walk.moving(layer):
            layer.move(one, batch)
    expected = walked([stream_of(tiny)], BATCHES)[0]
    assert same([tail.logits(stream, 0, 0, 24) for tail in walk.tail()], expected[:1])


def test_looking_at_what_a_layer_makes_moves_nothing(tiny: Subject) -> None:
    stream = stream_of(tiny)
    walk = Walk([stream], BATCHES)
    for layer in walk.layers():
        states = layer.states(stream, 0).clone()
        first, second = layer.forward(stream, 0), layer.forward(stream, 0)
        assert torch.equal(first, second)
        assert torch.equal(layer.states(stream, 0), states)
        for one, batch in walk.moving(layer):
            layer.move(one, batch)
        assert torch.equal(layer.states(stream, 0), first)
    expected = walked([stream_of(tiny)], BATCHES)[0]
    assert same([tail.logits(stream, 1, 0, 20) for tail in walk.tail()], expected[1:])


def test_a_stream_that_is_not_moved_stays_behind(tiny: Subject) -> None:
    """Its states go into every layer as they were: what a search over one layer's versions needs."""
    source = source_of(tiny)
    moving, standing = Stream(source), Stream(source)
    walk = Walk([moving, standing], BATCHES)
    start = None
    for layer in walk.layers():
        start = layer.states(standing, 0).clone() if start is None else start
        assert torch.equal(layer.states(standing, 0), start)
        for batch in range(len(BATCHES)):
            layer.move(moving, batch)
    expected = walked([stream_of(tiny)], BATCHES)[0]
    assert same([tail.logits(moving, 0, 0, 24) for tail in walk.tail()], expected[:1])


def test_checkpoints_of_different_depths_walk_together(tmp_path: Path) -> None:
    batches = [text(24, 17, vocabulary=VOCABULARY)]
    subjects = [
        saved(small_model(family, num_hidden_layers=layers), tmp_path / family)
        for family, layers in (("mixtral", 2), ("deepseek_v1", 5))
    ]
    found = walked([stream_of(subject) for subject in subjects], batches)
    for subject, logits in zip(subjects, found, strict=True):
        assert same(logits, walked([stream_of(subject)], batches)[0])


def test_a_model_in_memory_walks_as_it_is(tiny: Subject) -> None:
    model = running(tiny)
    stream = Stream(Source.of_model(model, tiny.anatomy))
    assert same(walked([stream], BATCHES)[0], walked([stream_of(tiny)], BATCHES)[0])
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert all((logits == 0).all() for logits in walked([stream], BATCHES)[0])
    with pytest.raises(AssertionError, match="in the model itself"):
        Stream(stream.source, Overlay(tensors={"model.norm.weight": torch.zeros(1)}))


def test_a_visitor_that_fails_leaves_everything_in_order(tiny: Subject) -> None:
    source = source_of(tiny)
    source.supply.allow(source.supply.least)
    stream = Stream(source)

    def fails(block: MoeBlock, _seen: Observation) -> None:
        if block.layer == tiny.anatomy.moe_layers[1]:
            raise CheckpointError("enough")

    with pytest.raises(CheckpointError, match="enough"):
        Walk([stream], BATCHES).through(lambda _stream, _batch: fails)
    assert all(tensor.is_meta for tensor in stream.skeleton.model.state_dict().values())
    assert same(walked([stream], BATCHES)[0], walked([stream_of(tiny)], BATCHES)[0])


def test_a_stream_walks_once(tiny: Subject) -> None:
    stream = stream_of(tiny)
    with pytest.raises(AssertionError, match="walks once"):
        Walk([stream, stream], BATCHES)
