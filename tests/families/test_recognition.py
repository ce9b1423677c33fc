"""Which family, layout and role everything has, and what is said when something is not there."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.errors import CheckpointError, UnknownFamily
from moesurgeon.families import FAMILIES, families_of
from moesurgeon.families.keys import MAX_COUNT
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.runtime.cost import count_flops, count_parameters
from moesurgeon.surgery.anatomy import Anatomy, examine
from moesurgeon.surgery.completeness import problems_of
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, save_tensors, stock_config
from tests.families.running import load_stock

MODEL_TYPES = ("mixtral", "deepseek", "deepseek_v2", "deepseek_v3", "qwen2_moe")


def _anatomy(folder: Path) -> Anatomy:
    checkpoint = open_checkpoint(folder)
    return examine(checkpoint.config, checkpoint.tensors)


def _variant(folder: Path, target: Path, **config: Any) -> Path:
    """Copy ``folder`` with other values in config.json; None removes a key."""
    shutil.copytree(folder, target)
    edited = {key: value for key, value in {**config_of(folder), **config}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(edited))
    return target


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_both_layouts_are_that_of_the_running_model(stock: Stock, model_type: str, layout: str) -> None:
    folder = stock(model_type if layout == "per-expert" else f"{model_type} fused")
    anatomy = open_subject(str(folder)).anatomy
    model = load_stock(folder)
    assert model_type in anatomy.family.model_types
    assert anatomy.layout.name == layout
    assert anatomy.layers == len(model.model.layers)
    found = {
        layer: model.get_submodule(anatomy.family.block_module.replace("{layer}", str(layer)))
        for layer in range(anatomy.layers)
    }
    mixtures = [layer for layer, block in found.items() if hasattr(block, anatomy.family.experts_module)]
    assert list(anatomy.moe_layers) == mixtures
    for layer in mixtures:
        router = found[layer].get_submodule(anatomy.family.router_module)
        experts = found[layer].get_submodule(anatomy.family.experts_module)
        assert tuple(router.weight.shape) == (anatomy.experts, anatomy.hidden)
        assert tuple(experts.down_proj.shape) == (anatomy.experts, anatomy.hidden, anatomy.expert_width)
        assert router.top_k == anatomy.top_k
        assert anatomy.tensors[anatomy.router_weight(layer)].shape == (anatomy.experts, anatomy.hidden)
    assert problems_of(anatomy) == []


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("mixtral", {"expert": 4 * 8 * 3, "rows": 4}),
        ("mixtral fused", {"fused": 4 * 2, "rows": 4}),
        ("deepseek", {"expert": 3 * 8 * 3, "rows": 3, "shared": 3 * 3}),
        ("deepseek_v2", {"expert": 3 * 8 * 3, "rows": 3, "shared": 3 * 3}),
        # Three layers and the one for multi-token prediction; router weight and selection bias.
        ("deepseek_v3 mtp", {"expert": 4 * 8 * 3, "rows": 4 * 2, "shared": 4 * 3}),
        ("deepseek_v3 fused", {"fused": 3 * 2, "rows": 3 * 2, "shared": 3 * 3}),
        ("deepseek_v3 fp8", {"expert": 3 * 8 * 3 * 2, "rows": 3 * 2, "shared": 3 * 3}),
        ("mixtral mxfp4", {"fused": 4 * 2 * 2, "rows": 4}),
        ("qwen2_moe", {"expert": 3 * 8 * 3, "rows": 3, "shared": 3 * 3}),
    ],
)
def test_every_tensor_has_its_role(stock: Stock, name: str, roles: dict[str, int]) -> None:
    anatomy = open_subject(str(stock(name))).anatomy
    counts = Counter(role.kind for role in anatomy.roles.values())
    assert {kind: count for kind, count in counts.items() if kind != "other"} == roles
    # No tensor whose name has to do with experts is taken for something else. (Qwen2-MoE's gate on
    # its shared expert is of no expert: one row, whatever their number.)
    others = [name for name, role in anatomy.roles.items() if role.kind == "other"]
    assert [name for name in others if "expert" in name and "shared_expert_gate" not in name] == []
    for tensor, role in anatomy.of_kind("fused", "rows"):
        assert anatomy.tensors[tensor].shape[role.axis] == anatomy.experts


def test_suffixes_of_quantised_experts_are_kept_apart(stock: Stock) -> None:
    fp8 = open_subject(str(stock("deepseek_v3 fp8"))).anatomy
    assert {role.suffix for _, role in fp8.of_kind("expert")} == {".weight", ".weight_scale_inv"}
    assert {role.projection for _, role in fp8.of_kind("expert")} == {"gate", "up", "down"}
    mxfp4 = open_subject(str(stock("mixtral mxfp4"))).anatomy
    assert {role.suffix for _, role in mxfp4.of_kind("fused")} == {"_blocks", "_scales"}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_rule_for_renormalising_is_the_routers(stock: Stock, model_type: str) -> None:
    """Chosen weights add up to one exactly where the family says that the gate renormalises."""
    anatomy = _anatomy(stock(model_type))
    model = load_stock(stock(model_type))
    layer = anatomy.moe_layers[0]
    block = model.get_submodule(anatomy.family.block_module.replace("{layer}", str(layer)))
    hidden = torch.randn(5, anatomy.hidden, generator=torch.Generator().manual_seed(0))
    _, weights, _ = block.gate(hidden)
    scale = anatomy.config.get(anatomy.family.router.scale_key or "", 1.0)
    sums_to_one = torch.allclose(weights.sum(-1), torch.full((5,), float(scale)), atol=1e-5)
    assert sums_to_one is anatomy.renormalises


def test_a_single_choice_of_deepseek_v1_stays_raw() -> None:
    rule = next(family for family in FAMILIES if family.name == "deepseek_v1").router
    assert rule.renormalises({"norm_topk_prob": True}, top_k=2)
    assert not rule.renormalises({"norm_topk_prob": True}, top_k=1)
    assert not rule.renormalises({}, top_k=2)


def test_groups_are_those_that_stock_takes_when_config_json_is_silent() -> None:
    v3 = families_of({"model_type": "deepseek_v3"})[0]
    default = stock_config("deepseek_v3", n_group=8, topk_group=4)
    assert v3.router.group_counts({}) == (default.n_group, default.topk_group)
    v2 = families_of({"model_type": "deepseek_v2"})[0]
    assert v2.router.group_counts({"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}) == (4, 2)
    assert v2.router.group_counts({"n_group": 4, "topk_group": 2, "topk_method": "greedy"}) == (1, 1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"model_type": "step3p7", "num_experts_per_tok": 1},
            "'step3p7' is not known; moesurgeon knows mixtral",
        ),
        ({"num_experts_per_tok": 1}, "no model_type; moesurgeon knows mixtral"),
        ({"model_type": ["mixtral"], "num_experts_per_tok": 1}, "is not known"),
    ],
)
def test_an_unknown_family_lists_the_known_ones(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownFamily, match=says):
        examine(config, {})


def test_a_dense_model_is_told_so() -> None:
    with pytest.raises(CheckpointError, match="dense model"):
        examine({"model_type": "llama"}, {"model.layers.0.mlp.up_proj.weight": TensorSpec("x", "F32", (1,))})


def test_weights_of_another_model_are_told_so(stock: Stock, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_tensors(stock("mixtral")).items() if ".experts." not in name}
    with pytest.raises(CheckpointError, match="no tensor is named like its experts"):
        _anatomy(save_tensors(tmp_path, config_of(stock("mixtral")), tensors))


def test_two_layouts_in_one_folder_are_refused(stock: Stock, tmp_path: Path) -> None:
    tensors = load_tensors(stock("mixtral")) | load_tensors(stock("mixtral fused"))
    with pytest.raises(CheckpointError, match="one by one and fused"):
        _anatomy(save_tensors(tmp_path, config_of(stock("mixtral")), tensors))


def _without(*parts: str) -> Any:
    return lambda tensors: {name: value for name, value in tensors.items() if not all(part in name for part in parts)}


def _cut(part: str) -> Any:
    return lambda tensors: {name: value[:-1] if part in name else value for name, value in tensors.items()}


def _narrowed(part: str) -> Any:
    return lambda tensors: {name: value[:, :-1] if part in name else value for name, value in tensors.items()}


def _with(name: str) -> Any:
    return lambda tensors: {**tensors, name: torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("mixtral", _without("layers.1.", ".experts.3.w2."), "layer 1 expert 3 lacks w2.weight"),
        ("mixtral", _without("layers.1.", ".experts.3."), "layer 1 holds 7 experts between 0 and 7, with gaps"),
        ("mixtral", _without("layers.1.", ".experts.7."), "layer 1 holds experts 0 to 6"),
        ("mixtral", _without("layers.1.", ".experts."), r"layers \[1\] should have experts"),
        ("mixtral", _without("layers.1.", ".w3."), "layer 1 lacks w3 of every expert"),
        ("mixtral", _without("layers.1.", ".gate."), "layer 1 has experts but no router weight"),
        ("mixtral", _cut("layers.1.block_sparse_moe.gate"), r"gate.weight has shape \[7, 64\]"),
        ("mixtral", _cut("layers.1.block_sparse_moe.experts.2.w1"), r"w1.weight has shape \[95, 64\]"),
        ("deepseek", _without("layers.0."), "counts 4 layers, the shards hold 3"),
        ("mixtral", _without("layers.2.", "q_proj"), "layer 2 lacks self_attn.q_proj.weight"),
        ("mixtral", _with("model.layers.0.block_sparse_moe.experts.0.w9.weight"), "w9.weight belongs to the experts"),
        ("mixtral fused", _without("layers.1.", "down_proj"), "layer 1 lacks down_proj of every expert"),
        ("mixtral fused", _cut("layers.1.mlp.experts.down_proj"), "holds 7 experts"),
        ("mixtral fused", _narrowed("layers.1.mlp.experts.down_proj"), r"shape \[8, 63, 96\]"),
        ("mixtral mxfp4", _cut("layers.1.mlp.experts.gate_up_proj_scales"), "holds 7 experts"),
        ("deepseek_v3", _without("layers.2.", "e_score"), "layer 2 lacks mlp.gate.e_score_correction_bias"),
        ("deepseek_v3 mtp", _without("layers.4.", ".experts.5.up"), "layer 4 expert 5 lacks up_proj.weight"),
        ("deepseek_v4 mtp", _without("mtp.0.", ".experts.5.w2"), "layer 4 expert 5 lacks w2.weight"),
        ("deepseek_v4 mtp", _without("mtp.0.", "gate.weight"), "layer 4 has experts but no router weight"),
        ("deepseek_v4 mtp", _cut("mtp.0.ffn.gate.bias"), r"mtp.0.ffn.gate.bias has shape \[7\], config.json counts 8"),
        ("deepseek_v4", _with("layers.4.attn_norm.weight"), r"counts 4 layers, but layers \[4\] are stored as well"),
        ("ernie4_5_moe mtp", _without("mtp_block.0.", ".experts.7."), "layer 4 holds experts 0 to 6"),
        ("deepseek_v3 mtp", _cut("layers.4.mlp.gate.e_score"), r"shape \[7\], config.json counts 8"),
        ("deepseek_v3", _without("layers.2.", "shared_experts.up"), "layer 2 lacks mlp.shared_experts.up_proj.weight"),
        ("deepseek_v3 fp8", _without("layers.2.", ".experts.5.up_proj.weight_scale"), "lacks up_proj.weight_scale_inv"),
    ],
)
def test_whatever_is_missing_is_named(stock: Stock, tmp_path: Path, name: str, damage: Any, says: str) -> None:
    folder = save_tensors(tmp_path, config_of(stock(name)), damage(load_tensors(stock(name))))
    with pytest.raises(CheckpointError, match=says):
        open_subject(str(folder))
    assert open_subject(str(folder), complete=False).anatomy.experts == 8


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("mixtral", {"num_local_experts": 9}, "counts 9 experts"),
        ("mixtral", {"num_experts": 6}, "contradicts itself: num_local_experts = 8 and num_experts = 6"),
        ("mixtral", {"num_local_experts": None}, "lacks num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "the top 9 of 8 experts"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok = 0"),
        ("mixtral", {"num_hidden_layers": 5}, r"layers \[4\] should have experts"),
        ("mixtral", {"num_hidden_layers": MAX_COUNT}, "layers .* and 999988 more should have experts"),
        ("mixtral", {"num_hidden_layers": 10**12}, "no usable number"),
        ("deepseek", {"first_k_dense_replace": 2}, r"layers \[1\] hold experts, but config.json makes them dense"),
        ("deepseek_v3", {"n_group": 3}, "8 experts do not divide into 3"),
        ("deepseek_v3", {"n_group": 8}, "too few for 8 routing groups of at least 2"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "top 5 does not fit into 1 groups of 4"),
        ("qwen2_moe", {"mlp_only_layers": []}, r"layers \[1\] should have experts"),
        ("qwen2_moe", {"mlp_only_layers": 1}, "is no list|no list"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    stock: Stock, tmp_path: Path, name: str, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        open_subject(str(_variant(stock(name), tmp_path / "variant", **config)))
    assert len(str(error.value)) < 400


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**30),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "ernie4_5_moe", "hunyuan_v1_moe", "dbrx", "llama4_text", "jamba"])
def test_no_config_breaks_anything_but_itself(stock: Stock, model_type: str) -> None:
    """config.json is untrusted: whatever it says, CheckpointError is the worst that comes of it."""
    checkpoint = open_checkpoint(stock(model_type))

    @given(st.sampled_from(sorted(checkpoint.config)), ANYTHING)
    @example("num_hidden_layers", 10**15)
    @example("num_experts_per_tok", float("inf"))
    @example("first_k_dense_replace", "1")
    @example("mlp_only_layers", 3)
    @example("n_shared_experts", [2])
    @example("n_group", float("nan"))
    def holds(key: str, value: Any) -> None:
        try:
            anatomy = examine({**checkpoint.config, key: value}, checkpoint.tensors)
            problems_of(anatomy)
            assert anatomy.shared_experts >= 0
            assert anatomy.groups >= (1, 1)
            assert count_parameters(anatomy).total > 0
            assert count_flops(anatomy).total > 0
        except CheckpointError as error:
            assert len(str(error)) < 400

    holds()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_what_is_there_once_is_missed(stock: Stock, name: str) -> None:
    anatomy = _anatomy(stock("mixtral"))
    without = {other: spec for other, spec in anatomy.tensors.items() if other != name}
    assert any(name in problem for problem in problems_of(examine(anatomy.config, without)))


def test_a_tied_head_is_not_missed(stock: Stock) -> None:
    anatomy = _anatomy(stock("mixtral"))
    without = {name: spec for name, spec in anatomy.tensors.items() if name != "lm_head.weight"}
    assert problems_of(examine({**anatomy.config, "tie_word_embeddings": True}, without)) == []
