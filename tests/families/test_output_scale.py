"""What retop says of the size of the output, against the weights that stock routers give at every smaller top-k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.pipeline.inspect import output_scale
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.engine.small import batches_for, corpus_of, random_windows, source_of
from tests.families.conftest import Stock
from tests.families.factory import MODEL_TYPES, save_checkpoint
from tests.laws.inner_cases import Taken, observed

TOP_K = 3
# Their routers are not run here; what they do is in transformers' modeling files (families/*.py say where it is odd).
NOT_RUN = {"gpt_oss": "one", "hunyuan_v1_moe": "one", "deepseek_v4": "1.5", "dbrx": "one", "llama4_text": None}
BY_KEY = ("deepseek", "deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "lfm2_moe", "dots1")
CASES: list[tuple[str, bool | None]] = [
    *((name, None) for name in MODEL_TYPES if name not in NOT_RUN and name != "phimoe"),
    *((name, value) for name in BY_KEY for value in (True, False)),
]


@pytest.mark.parametrize(("model_type", "normalised"), CASES)
def test_it_is_what_the_routers_do(model_type: str, normalised: bool | None, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_experts_per_tok": TOP_K}
    if model_type == "ernie4_5_moe":  # its own name of it
        changes["moe_k"] = TOP_K
    if normalised is not None:
        changes["norm_topk_prob"] = normalised
    subject = open_subject(str(save_checkpoint(tmp_path / "model", model_type, **changes)))
    anatomy = subject.anatomy
    assert anatomy.family.not_run is None and anatomy.top_k == TOP_K
    source = source_of(subject)
    batches = batches_for(corpus_of(random_windows("one", count=4, vocabulary=96, longest=30)), 30)
    plans = [plan_retop(anatomy, RetopSpec(top_k=k)) for k in range(1, TOP_K)]
    streams = [Stream(source), *(Stream(source, Overlay(plan=plan)) for plan in plans)]
    taken = Taken(subject, source, batches, None)  # type: ignore[arg-type] # only to walk
    for whole, *fewer in observed(taken, streams).values():
        before_T = _sums(whole)
        for k, seen in enumerate([*fewer, whole], start=1):
            said, after_T = output_scale(anatomy, k), _sums(seen)
            constant = bool((after_T - after_T[0]).abs().max() < 1e-4)
            assert constant is said.startswith("the gate renormalises:"), said
            if constant:
                total = float(after_T.mean())
                named = said.rpartition(" ")[2]
                assert total == pytest.approx(1.0 if named == "one" else float(named), abs=1e-4)
                assert anatomy.family.router.renormalises(anatomy.config, k)
            elif k < TOP_K:
                assert "shrinks" in said
                assert (after_T <= before_T + 1e-6).all() and after_T.mean() < before_T.mean() - 1e-3
            assert ("leaves the weight of a single one as it is" in said) is (
                k == 1 and not constant and anatomy.renormalises
            )


def _sums(seen: list[Any]) -> torch.Tensor:
    """Return the sum of each token's weights."""
    return torch.cat([each[0].weights.double().sum(-1) for each in seen])


@pytest.mark.parametrize("model_type", NOT_RUN)
def test_of_families_that_are_not_run(stock: Stock, model_type: str) -> None:
    said, total = output_scale(open_subject(str(stock(model_type))).anatomy, 1), NOT_RUN[model_type]
    if total is None:
        assert said.startswith("the gate does not renormalise")
    else:
        assert said.startswith("the gate renormalises:") and said.endswith(f"add up to {total}")
