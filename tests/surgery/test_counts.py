"""A count that config.json holds in several places is edited in all of them, or the contradiction is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import CheckpointError, OutputError
from moesurgeon.families.keys import value_at
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.counts import unknown_counts
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.factory import config_of, load_tensors, save_checkpoint, save_tensors

KEPT = dict.fromkeys(range(4), (0, 2, 5, 6))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3_moe")


def _with(plain: Path, target: Path, config: dict[str, Any]) -> Subject:
    return open_subject(str(save_tensors(target, {**config_of(plain), **config}, load_tensors(plain))))


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ({"text_config": {"num_experts": 8, "num_experts_per_tok": 2}}, ("text_config.num_experts",)),
        ({"llm_config": {"num_local_experts": 8}}, ("llm_config.num_local_experts",)),
        ({"language_config": {"model": {"num_experts": 8}}}, ("language_config.model.num_experts",)),
        ({"n_routed_experts": 8, "moe_num_experts": 8}, ("n_routed_experts", "moe_num_experts")),
        ({"quantization_config": {"num_experts": 8}}, ("quantization_config.num_experts",)),
        ({"per_layer_config": {"1": {"num_experts": 8}}}, ("per_layer_config.1.num_experts",)),
        ({"num_moe_experts": 8, "text_config": {"n_expert": 8}}, ("num_moe_experts", "text_config.n_expert")),
    ],
)
def test_every_place_of_a_count_is_pruned(
    plain: Path, tmp_path: Path, config: dict[str, Any], keys: tuple[str, ...]
) -> None:
    source = _with(plain, tmp_path / "source", config)
    apply(plan_prune(source.anatomy, KEPT), source.checkpoint, tmp_path / "out")
    written = config_of(tmp_path / "out")
    assert [value_at(written, key) for key in keys] == [4] * len(keys)
    assert verify(str(tmp_path / "out"), str(source.root))["tensors_equal"]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"text_config": {"num_experts_per_tok": 2}}, "text_config.num_experts_per_tok"),
        ({"experts_per_token": 2}, "experts_per_token"),
        ({"moe_config": {"moe_topk": 2}}, "moe_config.moe_topk"),
        ({"moe_router_topk": 2}, "moe_router_topk"),
    ],
)
def test_every_place_of_top_k_is_edited(plain: Path, tmp_path: Path, config: dict[str, Any], key: str) -> None:
    source = _with(plain, tmp_path / "source", config)
    apply(plan_retop(source.anatomy, RetopSpec(top_k=1)), source.checkpoint, tmp_path / "out")
    assert value_at(config_of(tmp_path / "out"), key) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": {"num_experts": 6}},
        {"num_routed_experts": 3, "n_routed_experts": 6},
        {"per_layer_config": {"1": {"num_local_experts": 6}}},
    ],
)
def test_another_count_is_refused(plain: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    source = _with(plain, tmp_path / "source", config)
    with pytest.raises(CheckpointError, match=r"contradicts itself: num\w+ = 8 and \S+ = 6; remove"):
        plan_prune(source.anatomy, KEPT)
    assert plan_retop(source.anatomy, RetopSpec(top_k=1)).config


def test_another_top_k_is_refused(plain: Path, tmp_path: Path) -> None:
    source = _with(plain, tmp_path / "source", {"text_config": {"num_experts_per_tok": 4}})
    with pytest.raises(CheckpointError, match=r"= 2 and text_config\.num_experts_per_tok = 4; remove"):
        plan_retop(source.anatomy, RetopSpec(top_k=1))
    assert plan_prune(source.anatomy, KEPT).config


@pytest.mark.parametrize(
    "config",
    [
        {"vision_config": {"num_experts": 8}},
        {"speculative_config": {"draft": {"num_experts": 8}}},
        {"text_config": {"num_experts": None}},
        {"num_shared_experts": 8, "top_k": 2, "rope_scaling": {"factor": 8}},
        {"num_routed_experts": 0, "n_routed_experts": 0},
        {"moe_stats": {"num_experts": 99}},
        {"n_experts": 6, "moe_router_topk": 4},
    ],
)
def test_what_is_no_count_of_these_experts_stays(plain: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    source = _with(plain, tmp_path / "source", config)
    apply(plan_prune(source.anatomy, KEPT), source.checkpoint, tmp_path / "out")
    apply(plan_retop(source.anatomy, RetopSpec(top_k=1)), source.checkpoint, tmp_path / "top-1")
    for folder in ("out", "top-1"):
        written = config_of(tmp_path / folder)
        assert {key: written[key] for key in config} == config


def test_a_level_that_an_earlier_version_left_does_not_verify(plain: Path, tmp_path: Path) -> None:
    source = _with(plain, tmp_path / "source", {"text_config": {"num_experts": 8}})
    apply(plan_prune(source.anatomy, KEPT), source.checkpoint, tmp_path / "out")
    written = {**config_of(tmp_path / "out"), "text_config": {"num_experts": 8}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(written))
    with pytest.raises(OutputError, match=r"contradicts itself: .* = 4 and text_config\.num_experts = 8"):
        verify(str(tmp_path / "out"))
    with pytest.raises(OutputError, match="there is another text_config"):
        verify(str(tmp_path / "out"), str(source.root))


def test_a_text_model_inside_another_keeps_its_layout(tmp_path: Path) -> None:
    from moesurgeon.errors import UsageError

    folder = save_checkpoint(tmp_path, "deepseek")
    config = {**config_of(folder), "text_config": {"n_routed_experts": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="the text model inside another"):
        plan_layout(open_subject(str(folder)).anatomy, "qwen2-moe")


def test_what_may_be_a_count_is_named(plain: Path, tmp_path: Path) -> None:
    config = {
        "my_expert_number": 8,
        "expert_layer_period": 8,
        "num_experts": 8,
        "moe": {"all_experts": 8},
        "experts_by_layer": [8, 8],
    }
    source = _with(plain, tmp_path / "source", config)
    assert [line.split(":")[0] for line in unknown_counts(source.anatomy)] == [
        "config.json has my_expert_number = 8",
        "config.json has moe.all_experts = 8",
        "config.json has experts_by_layer = [8, 8]",
    ]
    assert unknown_counts(open_subject(str(plain)).anatomy) == []
