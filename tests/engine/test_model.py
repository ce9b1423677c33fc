"""A model never runs with weights that are not the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moesurgeon.engine.model import context_length, logits_of, moe_blocks
from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import Subject, open_subject
from tests.engine.small import FAMILIES, running, saved, small_model

SHARD = "model.safetensors"


def _with(subject: Subject, changes: dict[str, torch.Tensor | None]) -> Subject:
    """Write tensors into the checkpoint's shard, or remove them (None), and open it again."""
    tensors = load_file(subject.root / SHARD)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, subject.root / SHARD, metadata={"format": "pt"})
    return open_subject(str(subject.root), complete=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_runs_is_what_is_stored(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    subject = saved(model, tmp_path / "model")
    loaded = running(subject)
    assert not loaded.training
    tokens = torch.arange(20).reshape(2, 10)
    model.set_experts_implementation(loaded.config._experts_implementation)  # they differ in the last bit
    with torch.no_grad():
        assert torch.equal(logits_of(loaded, tokens, None), model(input_ids=tokens).logits)
    blocks = moe_blocks(loaded, subject.anatomy)
    assert [block.layer for block in blocks] == list(subject.anatomy.moe_layers)
    for block in blocks:
        stored = load_file(subject.root / SHARD)[subject.anatomy.router_weight(block.layer)]
        assert torch.equal(block.router.weight, stored)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_tensor_is_refused(name: str, tmp_path: Path) -> None:
    subject = _with(saved(small_model("mixtral"), tmp_path / "model"), {name: None})
    with pytest.raises(CheckpointError, match=f"lacks {name};"):
        running(subject)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral"), tmp_path / "model")
    subject = _with(subject, dict.fromkeys(n for n in subject.checkpoint.tensors if ".experts.7." in n))
    with pytest.raises(CheckpointError, match=r"\.experts\.gate_up_proj is stored in part only"):
        running(subject)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.surprise.weight", "surprise"])
def test_an_unexpected_tensor_is_refused(name: str, tmp_path: Path) -> None:
    subject = _with(saved(small_model("deepseek_v3"), tmp_path / "model"), {name: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=f"has the unknown {name}"):
        running(subject)


def test_layers_for_multi_token_prediction_are_no_surprise(tmp_path: Path) -> None:
    """They are in the file, and no part of the model that runs."""
    subject = saved(small_model("deepseek_v3"), tmp_path / "model")
    tensors = load_file(subject.root / SHARD)
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
    mtp = {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()}
    mtp["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    extended = _with(subject, mtp)
    assert extended.anatomy.mtp_layers == (3,)
    tokens = torch.arange(10)[None]
    assert torch.equal(
        logits_of(running(extended), tokens, None),
        logits_of(running(saved(small_model("deepseek_v3"), tmp_path / "b")), tokens, None),
    )


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    subject = _with(saved(small_model("mixtral"), tmp_path / "model"), {"model.norm.weight": torch.ones(31)})
    with pytest.raises(CheckpointError, match=r"has shape \[31\], but by config\.json .* \[32\]") as raised:
        running(subject)
    assert "\n" not in str(raised.value)


def test_a_config_that_transformers_cannot_use_is_refused(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral"), tmp_path / "model")
    path = subject.root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "no such function"}))
    with pytest.raises(
        CheckpointError, match=f"transformers {transformers.__version__} cannot build a model from config"
    ):
        running(open_subject(str(subject.root)))


def test_loading_keeps_the_verbosity_of_transformers(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral"), tmp_path / "model")
    before = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_info()
        running(subject)
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity(before)


def test_the_context_is_what_the_config_says(tmp_path: Path, tiny: Subject) -> None:
    assert context_length(tiny.anatomy) == 512
    assert context_length(saved(small_model("mixtral"), tmp_path / "model").anatomy) == 64
