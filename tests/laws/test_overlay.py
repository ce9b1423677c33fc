"""A stream with an overlay is the checkpoint that would be written: judged before a byte is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from moesurgeon.engine.destinations import running_name
from moesurgeon.engine.streams import Delta, Overlay, Stream
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery import edits
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, compose, identity
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.engine.small import running, source_of, stream_of
from tests.families.conftest import Stock
from tests.laws.walks import LAYOUTS, RUNS, routed, same, text, walked

BATCHES = [text(24, 17, 9), text(20, 20)]
# In two groups as many of each, another choice in every layer.
KEPT = {0: (0, 2, 5, 6), 1: (0, 2, 5, 6), 2: (1, 2, 4, 7), 3: (0, 3, 4, 5)}


def _kept(subject: Subject) -> dict[int, tuple[int, ...]]:
    return {layer: KEPT[layer] for layer in subject.anatomy.moe_layers}


def _dropped(subject: Subject) -> dict[int, frozenset[int]]:
    return {layer: frozenset(range(8)) - set(kept) for layer, kept in _kept(subject).items()}


def _new_routers(subject: Subject) -> EditPlan:
    plan = identity(subject.anatomy)
    outputs = dict(plan.outputs)
    for layer in subject.anatomy.moe_layers:
        spec = subject.anatomy.tensors[subject.anatomy.router_weight(layer)]
        values = torch.randn(spec.shape, generator=torch.Generator().manual_seed(layer))
        outputs[spec.name] = edits.replace(spec, values.numpy().tobytes, key=f"random {layer}")
    return EditPlan(outputs)


def _retop_and_prune(subject: Subject) -> EditPlan:
    first = plan_retop(subject.anatomy, RetopSpec(top_k=1))
    return compose(first, plan_prune(first.result(subject.anatomy), _kept(subject)))


def _routers_then_prune(subject: Subject) -> EditPlan:
    first = _new_routers(subject)
    return compose(first, plan_prune(first.result(subject.anatomy), _kept(subject)))


def _other_layout(subject: Subject) -> EditPlan:
    layouts = [layout.name for layout in subject.anatomy.family.layouts if layout is not subject.anatomy.layout]
    return plan_layout(subject.anatomy, layouts[0]) if layouts else identity(subject.anatomy)


PLANS = {
    "identity": lambda subject: identity(subject.anatomy),
    "retop": lambda subject: plan_retop(subject.anatomy, RetopSpec(top_k=1)),
    "prune": lambda subject: plan_prune(subject.anatomy, _kept(subject)),
    "retop, prune": _retop_and_prune,
    "routers": _new_routers,
    "routers, prune": _routers_then_prune,
    "layout": _other_layout,
}


def _are_what_would_be_written(subject: Subject, plans: Mapping[str, EditPlan], folder: Path) -> None:
    """All in one walk, beside the checkpoint itself; with all of it in memory and two layers at a time."""
    expected = [walked([stream_of(subject)], BATCHES)[0]]
    for name, plan in plans.items():
        apply(plan, subject.checkpoint, folder / name)
        expected += walked([stream_of(open_subject(str(folder / name)))], BATCHES)
    source = source_of(subject)
    streams = [Stream(source), *(Stream(source, Overlay(plan=plan)) for plan in plans.values())]
    for limit in (source.supply.plan.nbytes, source.supply.least):
        source.supply.allow(limit)
        for name, mine, theirs in zip(("itself", *plans), walked(streams, BATCHES), expected, strict=True):
            assert same(mine, theirs), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plan_walks_as_what_it_writes(name: str, stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(stock(name)))
    _are_what_would_be_written(subject, {made: make(subject) for made, make in PLANS.items()}, tmp_path)


def test_so_does_another_family(stock: Stock, tmp_path: Path) -> None:
    """DeepSeek-MoE v1 as Qwen2-MoE, whose shared expert has a gate: tensors that the source does not have."""
    subject = open_subject(str(stock("deepseek")))
    plan = plan_layout(subject.anatomy, "qwen2-moe")
    first = plan_prune(subject.anatomy, _kept(subject))
    both = compose(first, plan_layout(first.result(subject.anatomy), "qwen2-moe"))
    _are_what_would_be_written(subject, {"whole": plan, "pruned": both}, tmp_path)
    stream = Stream(source_of(subject), Overlay(plan=plan))
    assert stream.skeleton.model.config.model_type == "qwen2_moe"


@pytest.mark.parametrize("name", LAYOUTS)
def test_masked_experts_are_as_good_as_gone(name: str, stock: Stock) -> None:
    """With a selection bias and in groups as well: the same choice by the old numbers, the same logits to rounding."""
    subject = open_subject(str(stock(name)))
    source = source_of(subject)
    masked = Stream(source, Overlay(masked=_dropped(subject)))
    logits, chosen = routed(masked, BATCHES)
    expected, renumbered = routed(Stream(source, Overlay(plan=plan_prune(subject.anatomy, _kept(subject)))), BATCHES)
    for layer, kept in _kept(subject).items():
        for mine, theirs in zip(chosen[layer], renumbered[layer], strict=True):
            assert torch.equal(mine, torch.tensor(kept)[theirs]), layer
    for mine, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))
    whole, everyone = routed(Stream(source), BATCHES)
    assert not same(whole, logits)
    assert any(set(seen.unique().tolist()) - set(KEPT[layer]) for layer in KEPT for seen in everyone.get(layer, ()))


@pytest.mark.parametrize("name", RUNS)
def test_tensors_and_deltas_walk_as_a_checkpoint_that_has_them(name: str, stock: Stock, tmp_path: Path) -> None:
    subject = open_subject(str(stock(name)))
    model = running(subject)
    source = source_of(subject)
    random = torch.Generator().manual_seed(3)
    overlay = Overlay()
    layer = subject.anatomy.moe_layers[-1]
    experts = f"{subject.anatomy.family.block_module.replace('{layer}', str(layer))}.experts"
    router = running_name(subject.anatomy, subject.anatomy.router_weight(layer))
    replaced = (router, f"{experts}.down_proj", "model.embed_tokens.weight", subject.anatomy.family.final_norm)
    with torch.no_grad():
        for target in replaced:
            tensor = model.get_parameter(target)
            tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.2)
            overlay.tensors[target] = tensor.clone()
        for target in (f"{experts}.gate_up_proj", router):  # one of them beside a replacement
            tensor = model.get_parameter(target)
            *outer, out, into = tensor.shape
            delta = Delta(
                torch.randn(*outer, 3, into, generator=random), torch.randn(*outer, out, 3, generator=random), 0.05
            )
            overlay.deltas[target] = delta
            tensor.add_(0.05 * (delta.up @ delta.down))
        overlay.changes[router] = lambda weight: 2.0 * weight
        model.get_parameter(router).mul_(2.0)
    model.save_pretrained(tmp_path / "changed")
    changed = open_subject(str(tmp_path / "changed"))
    found, alone = walked([Stream(source, overlay), Stream(source)], BATCHES)
    assert same(found, walked([stream_of(changed)], BATCHES)[0])
    assert same(alone, walked([stream_of(subject)], BATCHES)[0])
    assert not same(found, alone)


def test_a_replaced_embedding_is_the_head_s_as_well_where_they_are_one(tmp_path: Path) -> None:
    from tests.families.factory import save_checkpoint

    subject = open_subject(str(save_checkpoint(tmp_path / "tied", "mixtral", tie_word_embeddings=True)))
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    model = running(subject)
    model.get_input_embeddings().weight.data.copy_(weight)
    model.save_pretrained(tmp_path / "changed")
    stream = Stream(source_of(subject), Overlay(tensors={"model.embed_tokens.weight": weight}))
    expected = walked([stream_of(open_subject(str(tmp_path / "changed")))], BATCHES)[0]
    assert same(walked([stream], BATCHES)[0], expected)
