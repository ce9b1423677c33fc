"""Recovery begins with the edited model, to the bit, and leaves its routers as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.engine.model import logits_of, moe_blocks
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.targets import Adapt, targets_of
from moesurgeon.surgery.retop import RetopSpec
from tests.engine.small import running, saved, small_model

GATES = {
    "renormalised": ("mixtral", {}),
    "raw": ("deepseek_v1", {}),
    "renormalised, but for top-1": ("deepseek_v1", {"norm_topk_prob": True}),
    "raw, scaled, in groups": ("deepseek_v2", {}),
    "sigmoid, renormalised, scaled, biased, in groups": ("deepseek_v3", {}),
    "raw beside a gated shared expert": ("qwen2_moe", {}),
}


# What is trained, and how many tensors of a layer that makes.
ADAPTED: list[tuple[tuple[Adapt, ...], int]] = [
    (("routers",), 2),
    (("full-routers",), 1),
    (("experts",), 2),
    (("full-routers", "experts-all"), 5),
]


@pytest.mark.parametrize("candidates", [None, 1, 3, 99])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("family", "changes"), GATES.values(), ids=GATES.keys())
def test_at_step_0_the_adapted_model_is_the_edited_one(
    family: str, changes: dict[str, Any], top_k: int, candidates: int | None, tmp_path: Path
) -> None:
    subject = saved(small_model(family, num_experts_per_tok=top_k, **changes), tmp_path / "model")
    for adapt, tensors in ADAPTED if candidates is None else ADAPTED[:1]:
        _assert_starts_from_the_edited_model(subject, candidates, adapt, tensors)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("candidates", [None, 1, 3])
def test_at_step_0_the_adapted_builtin_is_the_edited_one(
    tiny: Subject, top_k: int, candidates: int | None, out: Path
) -> None:
    retop(tiny.name, RetopSpec(top_k=top_k), Writing(output=out, link=True, allow_noop=True))
    _assert_starts_from_the_edited_model(open_subject(str(out)), candidates, *ADAPTED[0])


def _assert_starts_from_the_edited_model(
    subject: Subject, candidates: int | None, adapt: tuple[Adapt, ...], tensors: int
) -> None:
    model = running(subject)
    tokens = torch.arange(60).reshape(3, 20)
    edited = logits_of(model, tokens, None)
    with learning_routers(model, subject.anatomy, candidates=candidates) as learning:
        adapted = Adapted(model, targets_of(model, subject.anatomy, adapt), rank=4)
        logits = adapted.model(input_ids=tokens, use_cache=False).logits
        assert (logits - edited).abs().max() <= 1e-6 * max(1.0, float(edited.abs().max()))
        assert [tuple(layer.chosen.shape) for layer in learning.routed] == [(60, subject.anatomy.top_k)] * len(
            subject.anatomy.moe_layers
        )
        # A pass without gradients, which judges, is the edited model to the bit, and leaves nothing behind.
        assert torch.equal(logits_of(model, tokens, None), edited)
        assert len(learning.routed) == len(subject.anatomy.moe_layers)
        trained = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
        assert all(".gate." in name or "experts." in name or "expert." in name for name in trained)
        shared = 6 if "experts-all" in adapt and subject.anatomy.shared_experts else 0
        assert len(trained) == len(adapted.weights()) == len(subject.anatomy.moe_layers) * (tensors + shared)


def test_the_routers_are_restored_even_after_an_error(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral"), tmp_path / "model")
    model = running(subject)
    blocks = moe_blocks(model, subject.anatomy)
    with pytest.raises(RuntimeError, match="inside"), learning_routers(model, subject.anatomy, candidates=None):
        raise RuntimeError("inside")
    assert all(block.router.forward == type(block.router).forward.__get__(block.router) for block in blocks)
