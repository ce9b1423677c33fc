"""Families that moesurgeon runs are followed to the weight; the others are refused with the reason."""

from typing import Any

import pytest
import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import logits_of as our_logits
from moesurgeon.engine.model import moe_blocks, shared_experts
from moesurgeon.engine.observe import observed, replays
from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.engine.whole import load_model
from moesurgeon.errors import CheckpointError
from moesurgeon.families import FAMILIES
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.profiling.collector import follows_rule
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.targets import targets_of
from tests.engine.small import source_of
from tests.families.conftest import Stock
from tests.families.factory import MODEL_TYPES
from tests.families.running import logits_of, tokens_for

BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
RUNS = [name for name in MODEL_TYPES if BY_TYPE[name].not_run is None]
REFUSED = [name for name in MODEL_TYPES if BY_TYPE[name].not_run is not None]


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_is_followed_to_the_weight(stock: Stock, name: str) -> None:
    """The recorded routing replays through the stock experts, and is what the family's rule says."""
    subject = open_subject(str(stock(name)))
    model = load_model(subject.checkpoint, subject.anatomy, Placement(torch.device("cpu"), torch.float32))
    blocks, routing = moe_blocks(model, subject.anatomy), routing_of(subject.anatomy)
    stock_forward = {block.layer: block.experts.forward for block in blocks}
    checked = []

    def visit(block: Any, seen: Any) -> None:
        checked.append((replays(block, seen, stock_forward[block.layer]), follows_rule(routing, block, seen)))

    expected = logits_of(model)
    with observed(blocks, visit):
        assert torch.allclose(our_logits(model, tokens_for(model), None), expected, atol=1e-4)
    assert checked == [(True, True)] * len(subject.anatomy.moe_layers)


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_is_measured_and_learns(stock: Stock, name: str) -> None:
    """Its head alone makes the logits, and a router under training starts from what the model computes."""
    subject = open_subject(str(stock(name)))
    model = load_model(subject.checkpoint, subject.anatomy, Placement(torch.device("cpu"), torch.float32))
    tokens = torch.arange(40).reshape(2, 20)
    expected = our_logits(model, tokens, None)
    stream = Stream(Source.of_model(model, subject.anatomy))
    walk = Walk([stream], [Batch("text", (), tokens, None)])
    walk.through()
    for tail in walk.tail():
        assert torch.allclose(tail.logits(stream, 0, 0, 20), expected, atol=1e-5)
    shared = [shared_experts(block) for block in moe_blocks(model, subject.anatomy)]
    with learning_routers(model, subject.anatomy, candidates=None) as learning:
        adapted = Adapted(model, targets_of(model, subject.anatomy, ("routers", "experts-all")), rank=2)
        logits = adapted.model(input_ids=tokens, use_cache=False).logits
        assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert len(learning.routed) == len(subject.anatomy.moe_layers)
        logits.square().mean().backward()
        for key, value in adapted.model.named_parameters():
            assert value.requires_grad == ("lora_" in key)
            if "lora_B" in key:
                assert value.grad is not None and value.grad.abs().max() > 0
        with torch.no_grad():
            for weight in adapted.weights():
                weight.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(weight.numel()))
        moved = our_logits(model, tokens, None)
        assert (moved - expected).abs().max() > 1e-4
        # Merged under the names and in the shapes of the checkpoint's tensors, the weights are what ran.
        plain = load_model(subject.checkpoint, subject.anatomy, Placement(torch.device("cpu"), torch.float32))
        merged, places = dict(adapted.merged()), Stream(source_of(subject))
        assert len(merged) == sum(3 if found is None else 6 for found in shared)
        for parameter, weight in merged.items():
            assert torch.equal(places.as_stored(parameter, weight), weight)
            plain.get_parameter(parameter).data.copy_(weight)
        again = our_logits(plain, tokens, None)
        assert (again - moved).abs().max() <= 1e-4 * max(1.0, float(moved.abs().max()))


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_run_says_so(stock: Stock, name: str) -> None:
    subject = open_subject(str(stock(name)))
    with pytest.raises(CheckpointError, match=r"cannot be run by moesurgeon: .*; inspect, retop") as error:
        load_model(subject.checkpoint, subject.anatomy, Placement(torch.device("cpu"), torch.float32))
    assert "\n" not in str(error.value)
