"""Surgery in every family and layout, byte by byte: nothing changes but what counts experts."""

from pathlib import Path

import pytest
import torch

from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import identity
from moesurgeon.surgery.prune import plan_prune
from tests.families.conftest import Stock
from tests.families.factory import MODEL_TYPES, config_of, load_tensors, save_tensors
from tests.families.second_opinion import flat, kept_of, pruned, same

# Families that are stored in two ways, or under two sets of names.
FUSED = [
    "mixtral",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "dots1",
    "ernie4_5_moe",
    "minimax_m2",
    "jamba",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "phimoe",
]
MTP = ("deepseek_v3 mtp", "glm4_moe mtp", "glm4_moe_lite mtp", "minimax_m2 mtp", "ernie4_5_moe mtp", "deepseek_v4 mtp")
EVERYTHING = [*MODEL_TYPES, *(f"{name} fused" for name in FUSED), "deepseek_v4 saved", "deepseek_v4 fused", *MTP]


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_identity_reproduces_every_byte(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    apply(identity(source.anatomy), source.checkpoint, out)
    same(load_tensors(out), load_tensors(source.root))
    assert (out / "config.json").read_text().strip() == (source.root / "config.json").read_text().strip() or (
        list(flat(config_of(out)).items()) == list(flat(config_of(source.root)).items())
    )


@pytest.mark.parametrize("name", [*EVERYTHING, "deepseek_v3 fp8", "mixtral mxfp4"])
def test_everything_that_counts_experts_shrinks_in_step(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    kept = kept_of(source)
    apply(plan_prune(source.anatomy, kept), source.checkpoint, out)
    same(load_tensors(out), pruned(load_tensors(source.root), kept))
    before, after = flat(config_of(source.root)), flat(config_of(out))
    assert list(before) == list(after)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key in source.anatomy.family.experts_keys if key in before}
    report = verify(str(out), str(source.root))
    assert report["tensors_equal"] == len(load_tensors(out)) and not report["tensors_replaced"]


@pytest.mark.parametrize("name", FUSED)
def test_the_layouts_are_the_same_weights(stock: Stock, tmp_path: Path, name: str) -> None:
    """What we fuse is what transformers fuses, and what we take apart is what it takes apart."""
    per_expert, fused = open_subject(str(stock(name))), open_subject(str(stock(f"{name} fused")))
    apply(plan_layout(fused.anatomy, "per-expert"), fused.checkpoint, tmp_path / "apart")
    apply(plan_layout(per_expert.anatomy, "fused"), per_expert.checkpoint, tmp_path / "joined")
    same(load_tensors(tmp_path / "apart"), load_tensors(per_expert.root))
    same(load_tensors(tmp_path / "joined"), load_tensors(fused.root))


def test_llama4_inside_the_multimodal_model(stock: Stock, tmp_path: Path) -> None:
    text = config_of(stock("llama4_text"))
    config = {"model_type": "llama4", "text_config": text, "vision_config": {"model_type": "llama4_vision_model"}}
    tensors = {f"language_model.{name}": tensor for name, tensor in load_tensors(stock("llama4_text")).items()}
    tensors["vision_model.layernorm_pre.weight"] = torch.ones(4)
    source = open_subject(str(save_tensors(tmp_path / "source", config, tensors)))
    kept = kept_of(source)
    apply(plan_prune(source.anatomy, kept), source.checkpoint, tmp_path / "pruned")
    same(load_tensors(tmp_path / "pruned"), pruned(tensors, kept))
    assert config_of(tmp_path / "pruned") == {**config, "text_config": {**text, "num_local_experts": 4}}
