"""DeepSeek-MoE v1 against a reference in float64 that knows only the published names and arithmetic.

Legend: T tokens, H hidden, D head size, E experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from moesurgeon.engine.deepseek_v1 import DeepseekForCausalLM, DeepseekMoE, register
from moesurgeon.engine.device import Placement
from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import open_subject
from tests.engine.small import VOCABULARY, running, saved, small_model

Tensors = dict[str, torch.Tensor]

CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {},
    "every second layer": {"num_hidden_layers": 5, "first_k_dense_replace": 1, "moe_layer_freq": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "renormalised": {"norm_topk_prob": True, "num_experts_per_tok": 3},
    "renormalised, top-1": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "raw, top-1": {"num_experts_per_tok": 1},
    "no shared experts": {"n_shared_experts": None},
    "all at once": {
        "num_hidden_layers": 5,
        "moe_layer_freq": 2,
        "norm_topk_prob": True,
        "n_shared_experts": None,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-3,
    },
}


def reference(folder: Path, tokens_T: torch.Tensor) -> torch.Tensor:
    """Return the logits [T, V] of the checkpoint in ``folder`` for one sequence."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    x_TH = weights["model.embed_tokens.weight"][tokens_T]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        normed = _norm(x_TH, own["input_layernorm.weight"], config["rms_norm_eps"])
        x_TH = x_TH + _attention(normed, own, config["num_attention_heads"], theta)
        normed = _norm(x_TH, own["post_attention_layernorm.weight"], config["rms_norm_eps"])
        sparse = layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0
        assert ("mlp.gate.weight" in own) == sparse
        x_TH = x_TH + (_mixture(normed, own, config) if sparse else _mlp(normed, own, "mlp."))
    return _norm(x_TH, weights["model.norm.weight"], config["rms_norm_eps"]) @ weights["lm_head.weight"].T


def _norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    return weight_H * x_TH / (x_TH.square().mean(-1, keepdim=True) + eps).sqrt()


def _mlp(x: torch.Tensor, own: Tensors, name: str) -> torch.Tensor:
    gate, up = own[f"{name}gate_proj.weight"] @ x.T, own[f"{name}up_proj.weight"] @ x.T
    return (own[f"{name}down_proj.weight"] @ (gate * gate.sigmoid() * up)).T


def _attention(x_TH: torch.Tensor, own: Tensors, heads: int, theta: float) -> torch.Tensor:
    length, hidden = x_TH.shape
    size = hidden // heads
    out_TH = torch.zeros_like(x_TH)
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        q, k, v = (x_TH @ own[f"self_attn.{name}_proj.weight"][mine].T for name in "qkv")
        q, k = _rotated(q, theta), _rotated(k, theta)
        for token in range(length):
            attention = (k[: token + 1] @ q[token] / size**0.5).softmax(0)
            out_TH[token, mine] = attention @ v[: token + 1]
    return out_TH @ own["self_attn.o_proj.weight"].T


def _rotated(x_TD: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate entry i with entry i + D/2 by position / theta^(2i/D)."""
    length, size = x_TD.shape
    half = size // 2
    angle = torch.arange(length).double()[:, None] / theta ** (torch.arange(half).double() * 2 / size)
    first, second = x_TD[:, :half], x_TD[:, half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def _mixture(x_TH: torch.Tensor, own: Tensors, config: dict[str, Any]) -> torch.Tensor:
    top_k = config["num_experts_per_tok"]
    out_TH = torch.zeros_like(x_TH)
    for token, x_H in enumerate(x_TH):
        p_E = (own["mlp.gate.weight"] @ x_H).softmax(0)
        chosen = sorted(range(len(p_E)), key=lambda expert: -float(p_E[expert]))[:top_k]
        total = sum(float(p_E[expert]) for expert in chosen) if config["norm_topk_prob"] and top_k > 1 else 1.0
        for expert in chosen:
            out_TH[token] += p_E[expert] / total * _mlp(x_H[None], own, f"mlp.experts.{expert}.")[0]
    if config["n_shared_experts"]:
        out_TH = out_TH + _mlp(x_TH, own, "mlp.shared_experts.")
    return out_TH


def _tokens(length: int = 12, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_are_those_of_the_reference(implementation: str, changes: dict[str, Any], tmp_path: Path) -> None:
    subject = saved(small_model("deepseek_v1", **changes), tmp_path / "model")
    model = running(subject)
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    tokens = _tokens()
    expected = reference(subject.root, tokens[0])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0]
    assert (logits.double() - expected).abs().max() <= 2e-5 * expected.abs().max()
    layers = [layer for layer, block in enumerate(model.model.layers) if isinstance(block.mlp, DeepseekMoE)]
    assert layers == list(subject.anatomy.moe_layers)


def test_the_gate_takes_its_softmax_in_the_dtype_of_the_model() -> None:
    block = small_model("deepseek_v1").to(torch.bfloat16).model.layers[1].mlp
    x_TH = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    logits, weights, indices = block.gate(x_TH)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, logits.softmax(-1).gather(-1, indices))


def test_saving_keeps_the_published_names_and_every_bit(tmp_path: Path) -> None:
    first = saved(small_model("deepseek_v1"), tmp_path / "first")
    assert {name for name in first.checkpoint.tensors if name.startswith("model.layers.1.mlp.")} == {
        "model.layers.1.mlp.gate.weight",
        *(f"model.layers.1.mlp.experts.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up", "down")),
        *(f"model.layers.1.mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")),
    }
    second = saved(running(first), tmp_path / "second")
    before, after = (load_file(subject.root / "model.safetensors") for subject in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(running(first)(_tokens()).logits, running(second)(_tokens()).logits)


def test_the_builtin_names_survive_a_round_trip(tmp_path: Path) -> None:
    builtin = open_subject("builtin:tiny-deepseek")
    model = running(builtin, Placement(torch.device("cpu"), torch.bfloat16))
    again = saved(model, tmp_path / "again")
    assert set(again.checkpoint.tensors) == set(builtin.checkpoint.tensors)
    assert all(again.anatomy.tensors[name].shape == spec.shape for name, spec in builtin.anatomy.tensors.items())


def test_generation_with_a_cache_is_generation_without() -> None:
    model = small_model("deepseek_v1", num_hidden_layers=5, moe_layer_freq=2)
    prompt = _tokens(7)
    mask = torch.ones_like(prompt)  # else generate takes token 0 for padding
    cached = model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    tokens = prompt
    for _ in range(8):
        with torch.no_grad():
            following = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    assert torch.equal(cached, tokens)


def test_padding_on_the_right_changes_no_text(tmp_path: Path) -> None:
    model = small_model("deepseek_v1")
    tokens, mask = _tokens(12, rows=2), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    with torch.no_grad():
        together = model(input_ids=tokens, attention_mask=mask).logits
        alone = model(input_ids=tokens[1:, :9]).logits
    torch.testing.assert_close(together[1, :9], alone[0], rtol=1e-5, atol=1e-5)


def test_router_logits_are_given_on_request() -> None:
    model = small_model("deepseek_v1")
    with torch.no_grad():
        output = model.model(input_ids=_tokens(), output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(12, 8)] * 2


def test_gradients_reach_every_part_of_the_mixture() -> None:
    model = small_model("deepseek_v1").train()
    model(input_ids=_tokens(40), labels=_tokens(40)).loss.backward()
    block = model.model.layers[1].mlp
    for parameter in (block.gate.weight, block.experts.gate_up_proj, block.shared_experts.down_proj.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_a_gate_that_is_no_softmax_is_refused(tmp_path: Path) -> None:
    saved(small_model("deepseek_v1"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scoring_func": "sigmoid"}))
    with pytest.raises(CheckpointError, match="softmax gate, but scoring_func is 'sigmoid'"):
        running(open_subject(str(tmp_path / "model")))


def test_the_auto_classes_know_it_and_registering_again_is_harmless() -> None:
    register()
    config = AutoConfig.for_model("deepseek", n_routed_experts=4, hidden_size=32, num_attention_heads=4, vocab_size=16)
    assert config.num_experts == 4
    config.update(
        {"num_hidden_layers": 2, "moe_intermediate_size": 8, "intermediate_size": 8, "num_key_value_heads": 4}
    )
    assert isinstance(AutoModelForCausalLM.from_config(config), DeepseekForCausalLM)
