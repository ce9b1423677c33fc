"""Adapters on routers: merged they are what ran, and running with other weights leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import logits_of
from moesurgeon.pipeline.subject import Subject
from moesurgeon.recovery.adapters import STORED, adapt_routers, adapted_routers, running_with
from tests.engine.small import running, saved, small_model

TOKENS = torch.arange(40).reshape(2, 20)
Adapted = tuple[Subject, PreTrainedModel, PeftModel]


@pytest.fixture(params=["mixtral", "deepseek_v1", "deepseek_v3"])
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> Adapted:
    """A model whose adapters are not at zero any more."""
    subject = saved(small_model(request.param), tmp_path / "model")
    model = running(subject)
    peft = adapt_routers(model, subject.anatomy, rank=3)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3, generator=random)
    return subject, model, peft


def _plain(subject: Subject, routers: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a fresh model with these routers."""
    fresh = running(subject)
    with torch.no_grad():
        for layer, weight in routers.items():
            fresh.get_submodule(f"model.layers.{layer}.mlp.gate").weight.copy_(weight)
    return logits_of(fresh, TOKENS, None)


def test_merged_routers_are_what_the_adapted_model_runs_with(adapted: Adapted) -> None:
    subject, model, peft = adapted
    routers = adapted_routers(peft, subject.anatomy)
    assert tuple(routers) == subject.anatomy.moe_layers
    logits = logits_of(model, TOKENS, None)
    torch.testing.assert_close(logits, _plain(subject, routers), rtol=1e-4, atol=1e-4)
    start = logits_of(running(subject), TOKENS, None)
    assert (logits - start).abs().max() > 0.01  # the adapters did something


def test_running_with_weights_is_a_model_that_has_them(adapted: Adapted) -> None:
    subject, model, peft = adapted
    other = {layer: weight.flip(0).contiguous() for layer, weight in adapted_routers(peft, subject.anatomy).items()}
    before = logits_of(model, TOKENS, None)
    with running_with(peft, subject.anatomy, other):
        assert torch.equal(logits_of(model, TOKENS, None), _plain(subject, other))
    assert torch.equal(logits_of(model, TOKENS, None), before)


def test_an_error_inside_leaves_the_adapters_in_place(adapted: Adapted) -> None:
    subject, model, peft = adapted
    before = logits_of(model, TOKENS, None)
    learning = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    routers = {layer: torch.zeros_like(w) for layer, w in adapted_routers(peft, subject.anatomy).items()}
    with pytest.raises(RuntimeError, match="inside"), running_with(peft, subject.anatomy, routers):
        raise RuntimeError("inside")
    assert torch.equal(logits_of(model, TOKENS, None), before)
    assert {name for name, parameter in peft.named_parameters() if parameter.requires_grad} == learning


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_routers_have_the_dtype_that_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    subject = saved(small_model("mixtral").to(dtype), tmp_path / "model")
    peft = adapt_routers(running(subject, Placement(torch.device("cpu"), torch.float32)), subject.anatomy, rank=2)
    stored = {subject.anatomy.tensors[subject.anatomy.router_weight(layer)].dtype for layer in (0, 1, 2)}
    assert {STORED[name] for name in stored} == {dtype}
    routers = adapted_routers(peft, subject.anatomy)
    assert {weight.dtype for weight in routers.values()} == {dtype}
    for layer, weight in routers.items():  # adapters start at zero
        assert torch.equal(
            weight, peft.get_submodule(f"base_model.model.model.layers.{layer}.mlp.gate").get_param().to(dtype)
        )
