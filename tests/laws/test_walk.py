"""Layer by layer or at once: what a walk computes is what stock transformers computes, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.pipeline.subject import Subject, open_subject
from tests.engine.small import source_of
from tests.families.conftest import Stock
from tests.families.factory import save_checkpoint
from tests.laws.walks import CPU, LAYOUTS, load_stock, logits_of, same, text, walked

BATCHES = [text(24, 24), text(24, 17, 9), text(13)]


def _sources(subject: Subject, placement: Placement) -> list[Source]:
    """The checkpoint with all of it in memory, and with two layers at a time."""
    resident, streamed = source_of(subject, placement), source_of(subject, placement)
    assert resident.supply.plan.is_resident
    streamed.supply.allow(streamed.supply.least)
    assert not streamed.supply.plan.is_resident
    return [resident, streamed]


def _assert_is_stock(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    model = load_stock(folder, dtype)
    expected = [logits_of(model, batch) for batch in BATCHES]
    assert all(logits.isfinite().all() and logits.std() > 0.01 for logits in expected)
    for source in _sources(open_subject(str(folder)), Placement(CPU, dtype)):
        stream = Stream(source)
        for attempt in range(2):  # the second walk has what the first one kept
            assert same(walked([stream], BATCHES)[0], expected), (source.supply.plan.is_resident, attempt)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_walk_is_the_stock_model(name: str, stock: Stock) -> None:
    """With padding and without, all in memory and two layers at a time, in every layout."""
    _assert_is_stock(stock(name))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding window": ("mixtral", {"sliding_window": 8}),
    "sliding window in some layers": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "sliding window, qwen3": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "tied": ("mixtral", {"tie_word_embeddings": True}),
    "tied, deepseek": ("deepseek", {"tie_word_embeddings": True}),
    "tied, deepseek_v3": ("deepseek_v3", {"tie_word_embeddings": True}),
    "tied, qwen2": ("qwen2_moe", {"tie_word_embeddings": True}),
    "tied, granite": ("granitemoe", {"tie_word_embeddings": True}),
    "untied, lfm2": ("lfm2_moe", {"tie_word_embeddings": False}),
    "top-1": ("mixtral", {"num_experts_per_tok": 1}),
    "biases": ("qwen3_moe", {"attention_bias": True}),
    "long positions": (
        "mixtral",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "positions by length": (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
         "max_position_embeddings": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_so_it_is_with_what_a_config_can_say(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    _assert_is_stock(save_checkpoint(tmp_path / "model", model_type, **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "deepseek", "deepseek_v2", "deepseek_v3 fused", "qwen2_moe", "minimax_m2",
                                  "ernie4_5_moe", "lfm2_moe", "jamba", "granitemoe"])  # fmt: skip
def test_so_it_is_in_less_precision(name: str, dtype: torch.dtype, stock: Stock) -> None:
    """Stored in float32 and rounded on the way; what transformers keeps in float32 stays so."""
    _assert_is_stock(stock(name), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_so_it_is_for_what_is_stored_in_less(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", name, dtype=dtype)
    _assert_is_stock(folder, dtype)
    _assert_is_stock(folder)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_experts_are_computed_in_the_way_that_was_asked_for(experts: str, stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    stream = Stream(source_of(subject))
    stream.skeleton.model.set_experts_implementation(experts)
    model = load_stock(subject.root, experts_implementation=experts)
    assert same(walked([stream], BATCHES)[0], [logits_of(model, batch) for batch in BATCHES])


@pytest.mark.parametrize("start", [0, 5, 23])
def test_a_part_of_the_positions_has_the_logits_of_all(start: int, tiny: Subject) -> None:
    from moesurgeon.engine.walk import Walk

    stream = Stream(source_of(tiny))
    walk = Walk([stream], BATCHES)
    walk.through()
    for tail in walk.tail():
        whole = tail.logits(stream, 1, 0, 24)
        torch.testing.assert_close(tail.logits(stream, 1, start, 24), whole[:, start:], rtol=1e-5, atol=1e-5)
