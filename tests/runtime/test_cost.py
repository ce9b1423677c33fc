"""Parameters and FLOPs from headers, held against the modules of the stock model (on the meta device)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.runtime.cost import count_flops, count_parameters
from moesurgeon.surgery.anatomy import Anatomy, examine
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.factory import save_checkpoint, stock_config
from tests.families.variants import packed, quantised, with_mtp_layer

CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("mixtral", {"tie_word_embeddings": True}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("deepseek", {}),
    ("deepseek", {"moe_layer_freq": 2, "tie_word_embeddings": True}),
    ("deepseek_v2", {}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 2}),
    ("qwen2_moe", {}),
]
IDS = [f"{name}-{'-'.join(config)}" for name, config in CASES]


def _meta_model(model_type: str, config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(stock_config(model_type, **config))


def _sizes(model: nn.Module) -> dict[str, int]:
    """Return parameters by name (a tied head once), and the selection biases, which files hold as well."""
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {name: tensor.numel() for name, tensor in [*model.named_parameters(), *biases.items()]}


def _part_of(name: str) -> str:
    """Return to which part of ``Flops`` a matrix of the running model belongs."""
    for pattern, part in (
        (r"lm_head", "head"),
        (r"self_attn", "attention"),
        (r"shared_expert", "shared_experts"),
        (r"mlp\.gate\.weight", "router"),
        (r"mlp\.experts", "routed_experts"),
        (r"mlp\.", "dense_mlp"),
    ):
        if re.search(pattern, name):
            return part
    return "none"


@pytest.mark.parametrize(("model_type", "config"), CASES, ids=IDS)
@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
def test_parameters_are_the_stock_models(tmp_path: Path, model_type: str, config: dict[str, Any], fused: bool) -> None:
    anatomy = open_subject(str(save_checkpoint(tmp_path, model_type, fused=fused, **config))).anatomy
    sizes = _sizes(_meta_model(model_type, config))
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    found = count_parameters(anatomy)
    assert found.total == sum(sizes.values())
    assert found.experts == routed
    assert found.active == found.total - routed + routed * anatomy.top_k // anatomy.experts


@pytest.mark.parametrize(("model_type", "config"), CASES, ids=IDS)
def test_flops_are_two_per_weight_of_every_matrix_at_work(
    tmp_path: Path, model_type: str, config: dict[str, Any]
) -> None:
    anatomy = open_subject(str(save_checkpoint(tmp_path, model_type, **config))).anatomy
    model = _meta_model(model_type, config)
    expected = dict.fromkeys(count_flops(anatomy).as_dict(), 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and _part_of(name) in expected:
            expected[_part_of(name)] += 2 * parameter.numel()
    if config.get("tie_word_embeddings"):
        expected["head"] = 2 * model.get_output_embeddings().weight.numel()
    expected["routed_experts"] = expected["routed_experts"] * anatomy.top_k // anatomy.experts
    expected["total"] = sum(expected.values())
    assert count_flops(anatomy).as_dict() == expected
    assert expected["head"] == 2 * 128 * 64


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek", "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_flops_are_what_a_forward_pass_does(tmp_path: Path, model_type: str) -> None:
    """Held against torch's own counter: one token, so that attention scores are next to nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    anatomy = open_subject(str(save_checkpoint(tmp_path, model_type))).anatomy
    model = AutoModelForCausalLM.from_config(stock_config(model_type), experts_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    attention_scores = 4 * 4 * 2 * (16 + 24)  # layers x heads x 2 x (width of a query and of a value, at most)
    assert 0 <= counter.get_total_flops() - count_flops(anatomy).total <= attention_scores


def test_layers_for_multi_token_prediction_are_in_the_total_only(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "plain", "deepseek_v3")
    plain = open_subject(str(folder)).anatomy
    more = open_subject(str(with_mtp_layer(folder, tmp_path / "mtp"))).anatomy
    assert more.mtp_layers == (4,)
    without, with_mtp = count_parameters(plain), count_parameters(more)
    assert with_mtp.active == without.active
    assert count_flops(more) == count_flops(plain)
    extra = [spec for name, spec in more.tensors.items() if name.startswith("model.layers.4.")]
    assert with_mtp.total - without.total == sum(torch.Size(spec.shape).numel() for spec in extra)
    assert with_mtp.experts - without.experts == 8 * 3 * 64 * 32


def test_scales_are_no_weights(tmp_path: Path) -> None:
    """An FP8 checkpoint counts as much as the one that it was made from, an MXFP4 one too."""
    folder = save_checkpoint(tmp_path / "v3", "deepseek_v3")
    plain = open_subject(str(folder)).anatomy
    fp8 = open_subject(str(quantised(folder, tmp_path / "fp8"))).anatomy
    assert count_parameters(fp8) == count_parameters(plain)
    assert count_flops(fp8) == count_flops(plain)
    fused = save_checkpoint(tmp_path / "fused", "mixtral", fused=True)
    plain = open_subject(str(fused)).anatomy
    mxfp4 = open_subject(str(packed(fused, tmp_path / "mxfp4"))).anatomy
    assert count_parameters(mxfp4) == count_parameters(plain)
    assert count_flops(mxfp4) == count_flops(plain)


def _numbers(anatomy: Anatomy) -> tuple[Any, Any]:
    return count_parameters(anatomy), count_flops(anatomy)


def test_edits_change_exactly_what_they_should(tiny: Subject) -> None:
    anatomy = tiny.anatomy
    parameters, flops = _numbers(anatomy)
    assert _numbers(plan_layout(anatomy, "fused").result(anatomy)) == (parameters, flops)

    top_1 = plan_retop(anatomy, RetopSpec(top_k=1)).result(anatomy)
    assert count_flops(top_1).routed_experts * anatomy.top_k == flops.routed_experts
    assert flops.total - count_flops(top_1).total == flops.routed_experts - count_flops(top_1).routed_experts
    assert count_parameters(top_1).total == parameters.total
    assert 2 * (parameters.active - count_parameters(top_1).active) == flops.total - count_flops(top_1).total

    half = plan_prune(anatomy, dict.fromkeys(anatomy.moe_layers, range(anatomy.experts // 2))).result(anatomy)
    fewer, less = _numbers(half)
    assert 2 * fewer.experts == parameters.experts
    assert less.routed_experts == flops.routed_experts  # a token still goes to as many
    assert 2 * less.router == flops.router
    assert flops.total - less.total == flops.router - less.router
    assert fewer.active == parameters.active - (flops.router - less.router) // 2


def test_the_report_adds_up(tiny: Subject) -> None:
    report = json.loads(json.dumps(count_flops(tiny.anatomy).as_dict()))
    assert report.pop("total") == sum(report.values())
    assert all(value > 0 for part, value in report.items() if part not in ("shared_experts", "dense_mlp"))


@pytest.mark.parametrize(
    ("quantisation", "stored"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            {
                "qweight": ("I32", (8, 4)), "qzeros": ("I32", (1, 4)), "scales": ("F16", (1, 32)),
                "g_idx": ("I32", (64,)),
            },
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}},
            {
                "weight_packed": ("I32", (32, 16)), "weight_scale": ("BF16", (32, 1)), "weight_shape": ("I64", (2,)),
            },
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {
                "weight": ("U8", (1024, 1)), "weight.absmax": ("F32", (32,)), "weight.quant_map": ("F32", (16,)),
                "weight.quant_state.bitsandbytes__nf4": ("U8", (90,)),
            },
        ),
    ],
    ids=["gptq", "compressed-tensors", "nf4"],
)  # fmt: skip
def test_packed_weights_are_counted_by_their_bits(
    tmp_path: Path, quantisation: dict[str, Any], stored: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    """As many in an element as its bits hold, and nothing of what lies beside them."""
    plain = open_subject(str(save_checkpoint(tmp_path / "plain", "qwen3_moe"))).anatomy
    tensors: dict[str, TensorSpec] = {}
    for name, spec in plain.tensors.items():
        if ".experts." not in name:
            tensors[name] = spec
            continue
        module = name.removesuffix("weight")
        tensors |= {module + part: TensorSpec(module + part, *how) for part, how in stored.items()}
    anatomy = examine({**plain.config, "quantization_config": quantisation}, tensors)
    experts = count_parameters(anatomy).experts
    assert experts == _words(stored) * 3 * 8 * 4
    assert count_parameters(anatomy).total - experts == count_parameters(plain).total - count_parameters(plain).experts


def _words(stored: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return how many weights the packed tensor of ``stored`` holds: 8 or 4 in 32 bits, 2 in a byte."""
    if "qweight" in stored:
        return 8 * 4 * 8
    return 32 * 16 * 4 if "weight_packed" in stored else 1024 * 2
