"""The laws of surgery for every family, on checkpoints of stock transformers at a tiny size."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import logits_of as our_logits
from moesurgeon.engine.model import moe_blocks
from moesurgeon.engine.observe import observed, replays
from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.engine.whole import load_model
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.families import FAMILIES
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.profiling.collector import follows_rule
from moesurgeon.recovery.adapters import adapt_routers, adapted_routers
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.runtime.cost import count_flops, count_parameters
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import compose, identity
from moesurgeon.surgery.prune import check_count, plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.conftest import Stock
from tests.families.factory import (
    MODEL_TYPES,
    config_of,
    load_tensors,
    quantised,
    save_checkpoint,
    save_tensors,
    stock_config,
)
from tests.families.running import load_stock, logits_expert_by_expert, logits_of, tokens_for

ROOT = Path(__file__).parents[2]
NEW = MODEL_TYPES[5:]  # the first five have files of their own in this folder
BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
RUNS = [name for name in NEW if BY_TYPE[name].not_run is None]
REFUSED = [name for name in NEW if BY_TYPE[name].not_run is not None]
TWO_LAYOUTS = [name for name in NEW if len(BY_TYPE[name].layouts) == 2]
# Whose rows or blocks have other names where fused.
RENAMED = ("ernie4_5_moe", "minimax_m2", "phimoe", "hunyuan_v1_moe")
# In two groups as many of each, another choice in every layer.
KEPT = {0: (0, 2, 5, 6), 1: (0, 2, 5, 6), 2: (1, 2, 4, 7), 3: (0, 3, 4, 5)}
# DeepSeek-V4's first layer chooses by a table, which names experts 0 to 5 here.
KEPT_BY_TABLE = {0: (0, 1, 2, 3, 4, 5), 1: (0, 1, 3, 4, 6, 7), 2: (1, 2, 3, 4, 5, 7), 3: (0, 2, 3, 5, 6, 7)}
ROWS = re.compile(r"\.(gate|wg|router|router\.layer)\.(weight|bias)$|e_score_correction_bias$|expert_bias$")


def _kept(subject: Subject) -> dict[int, tuple[int, ...]]:
    kept = KEPT_BY_TABLE if subject.anatomy.family.name == "deepseek_v4" else KEPT
    return {layer: kept[layer] for layer in subject.anatomy.moe_layers}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``config`` with dotted keys, in its order."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _expected(tensors: Mapping[str, torch.Tensor], all_kept: Mapping[int, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return what pruning makes of ``tensors``: a second opinion, by indexing with torch."""
    result = {}
    for name, tensor in tensors.items():
        layer = re.search(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.", name)
        kept = list(all_kept.get(int(layer[1]), ())) if layer else []
        one = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
        if not kept or "shared" in name:
            result[name] = tensor
        elif one:
            if int(one[2]) in kept:
                result[f"{one[1]}{kept.index(int(one[2]))}{one[3]}"] = tensor
        elif ".experts.mlp." in name:  # flat
            result[name] = tensor.unflatten(0, (8, -1))[kept].flatten(0, 1)
        elif name.endswith("tid2eid"):
            result[name] = torch.tensor([[kept.index(expert) for expert in row] for row in tensor.tolist()])
        elif ".experts." in name or "put_linear" in name or ROWS.search(name):
            result[name] = tensor[:, kept] if tensor.shape[0] == 1 else tensor[kept]
        else:
            result[name] = tensor
    return result


def _same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_every_family_has_a_fixture() -> None:
    assert set(BY_TYPE) - set(MODEL_TYPES) == {"llama4"}  # its own test below: no causal language model


def test_the_documentation_has_every_family_and_a_whole_example() -> None:
    page = (ROOT / "docs/families.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in page.splitlines() if row.startswith("| ")}
    for family in FAMILIES:
        row = rows[family.title.removesuffix(" (text)")]
        assert all(f"`{model_type}`" in row for model_type in family.model_types)
        assert ("| no: " in row) is (family.not_run is not None)
        assert ("no `retop`" in row) is (family.fixed_top_k is not None)
    assert f"```python\n{(ROOT / 'moesurgeon/families/qwen3_moe.py').read_text()}```" in page
    example = re.search(r'"qwen3_moe": (\{.*\}),\n', page)
    assert example is not None and example[0] in (ROOT / "tests/families/factory.py").read_text()


@pytest.mark.parametrize("name", NEW)
def test_the_anatomy_is_that_of_the_running_model(stock: Stock, name: str) -> None:
    anatomy = open_subject(str(stock(name))).anatomy  # complete
    model = load_stock(stock(name))
    found = {n: model.get_submodule(anatomy.family.block_module.replace("{layer}", str(n))) for n in range(4)}
    blocks = {n: block for n, block in found.items() if hasattr(block, anatomy.family.experts_module)}
    if name != "deepseek_v4":  # runs under other names than it is stored
        assert list(anatomy.moe_layers) == list(blocks)
    for block in blocks.values():
        router = block.get_submodule(anatomy.family.router_module)
        assert tuple(next(router.parameters()).shape) == (anatomy.experts, anatomy.hidden) == (8, 64)
        assert getattr(router, "top_k", 2) == anatomy.top_k == 2
    others = [tensor for tensor, role in anatomy.roles.items() if role.kind == "other"]
    assert not [tensor for tensor in others if re.search("expert|router", tensor) or ROWS.search(tensor)]


@pytest.mark.parametrize("name", NEW)
def test_the_identity_reproduces_every_byte(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    apply(identity(source.anatomy), source.checkpoint, out)
    _same(load_tensors(out), load_tensors(source.root))
    assert (out / "config.json").read_text().strip() == (source.root / "config.json").read_text().strip() or (
        list(_flat(config_of(out)).items()) == list(_flat(config_of(source.root)).items())
    )


@pytest.mark.parametrize("name", [*NEW, *(f"{name} fused" for name in RENAMED)])
def test_everything_that_counts_experts_shrinks_in_step(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    kept = _kept(source)
    apply(plan_prune(source.anatomy, kept), source.checkpoint, out)
    _same(load_tensors(out), _expected(load_tensors(source.root), kept))
    before, after = _flat(config_of(source.root)), _flat(config_of(out))
    assert list(before) == list(after)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key in source.anatomy.family.experts_keys if key in before}


# Routers that cannot be masked from outside to the last bit: DBRX takes its softmax elsewhere, sparsemixer
# compares logits with each other, and DeepSeek-V4's first layer has no choice to mask. The first and the
# last agree to rounding, see below; Phi's pruned tensors are held against a second opinion above.
@pytest.mark.parametrize("name", [name for name in NEW if name not in ("dbrx", "phimoe", "deepseek_v4")])
def test_pruning_is_masking(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    kept = _kept(source)
    apply(plan_prune(source.anatomy, kept), source.checkpoint, out)
    dropped = {layer: sorted(set(range(8)) - set(experts)) for layer, experts in kept.items()}
    whole = load_stock(source.root)
    before = logits_expert_by_expert(whole)
    masked = logits_expert_by_expert(whole, dropped)
    assert torch.equal(logits_expert_by_expert(load_stock(out)), masked)
    assert not torch.equal(before, masked), "the mask did nothing"


@pytest.mark.parametrize("name", ["dbrx", "deepseek_v4"])
def test_pruning_is_masking_to_rounding(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    kept = _kept(source)
    apply(plan_prune(source.anatomy, kept), source.checkpoint, out)
    masked = load_stock(source.root)
    before = logits_of(masked)
    for layer, experts in kept.items():
        gone = sorted(set(range(8)) - set(experts))
        if name == "dbrx":
            linear = masked.get_submodule(f"transformer.blocks.{layer}.ffn.router.layer")
            linear.register_forward_hook(
                lambda _m, _i, logits, gone=gone: logits.index_fill(-1, torch.tensor(gone), -1e9)
            )
        elif layer > 0:
            masked.get_submodule(f"model.layers.{layer}.mlp.gate").e_score_correction_bias[gone] = -1e9
    assert torch.allclose(logits_of(load_stock(out)), logits_of(masked), atol=1e-4)
    assert not torch.allclose(before, logits_of(masked), atol=1e-2)


@pytest.mark.parametrize("name", NEW)
def test_results_load_and_generate_in_stock_transformers(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    plan = plan_prune(source.anatomy, _kept(source))
    if source.anatomy.family.fixed_top_k is None:
        plan = compose(plan, plan_retop(plan.result(source.anatomy), RetopSpec(top_k=1)))
    apply(plan, source.checkpoint, out)
    model = load_stock(out)  # asserts that no key is missing or unexpected
    start = tokens_for(model, rows=1, length=4)
    longer = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=3, min_new_tokens=3, pad_token_id=0
    )
    assert longer.shape == (1, 7)


@pytest.mark.parametrize("name", [name for name in NEW if name != "phimoe"])
def test_top_1_is_the_stock_model_with_the_key_edited_by_hand(stock: Stock, tmp_path: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    apply(plan_retop(source.anatomy, RetopSpec(top_k=1)), source.checkpoint, tmp_path / "retop")
    config = config_of(source.root)
    holder = config["ffn_config"] if name == "dbrx" else config
    key = {"dbrx": "moe_top_k", "ernie4_5_moe": "moe_k", "hunyuan_v1_moe": "moe_topk"}.get(name, "num_experts_per_tok")
    assert holder[key] == 2
    holder[key] = 1
    assert config_of(tmp_path / "retop") == config
    assert list(_flat(config_of(tmp_path / "retop"))) == list(_flat(config))
    tensors = {
        tensor: value[:, :1] if tensor.endswith("tid2eid") else value
        for tensor, value in load_tensors(source.root).items()
    }
    _same(load_tensors(tmp_path / "retop"), tensors)
    logits = logits_of(load_stock(tmp_path / "retop"))
    by_hand = load_stock(save_tensors(tmp_path / "by hand", config, tensors))
    # Not bit for bit: in one file instead of several, tensors are aligned otherwise, which moves some kernels.
    assert torch.allclose(logits, logits_of(by_hand), atol=1e-4)
    assert not torch.equal(logits, logits_of(load_stock(source.root)))


def test_a_router_that_ignores_its_top_k_is_left_alone(stock: Stock) -> None:
    anatomy = open_subject(str(stock("phimoe"))).anatomy
    with pytest.raises(UsageError, match="takes 2 experts per token whatever"):
        plan_retop(anatomy, RetopSpec(top_k=1))
    with pytest.raises(UsageError, match="keep at least 2 experts"):
        check_count(anatomy, 1)


@pytest.mark.parametrize("name", TWO_LAYOUTS)
def test_the_layouts_are_the_same_weights(stock: Stock, tmp_path: Path, name: str) -> None:
    """What we fuse is what transformers fuses, and what we take apart is what it takes apart."""
    per_expert, fused = open_subject(str(stock(name))), open_subject(str(stock(f"{name} fused")))
    apply(plan_layout(fused.anatomy, "per-expert"), fused.checkpoint, tmp_path / "apart")
    apply(plan_layout(per_expert.anatomy, "fused"), per_expert.checkpoint, tmp_path / "joined")
    _same(load_tensors(tmp_path / "apart"), load_tensors(per_expert.root))
    _same(load_tensors(tmp_path / "joined"), load_tensors(fused.root))


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_is_followed_to_the_weight(stock: Stock, name: str) -> None:
    """The recorded routing replays through the stock experts, and is what the family's rule says."""
    subject = open_subject(str(stock(name)))
    model = load_model(subject.checkpoint, subject.anatomy, Placement(torch.device("cpu"), torch.float32))
    blocks, routing = moe_blocks(model, subject.anatomy), routing_of(subject.anatomy)
    stock_forward = {block.layer: block.experts.forward for block in blocks}
    checked = []

    def visit(block: Any, seen: Any) -> None:
        checked.append((replays(block, seen, stock_forward[block.layer]), follows_rule(routing, block, seen)))

    expected = logits_of(model)
    with observed(blocks, visit):
        assert torch.allclose(our_logits(model, tokens_for(model), None), expected, atol=1e-4)
    assert checked == [(True, True)] * len(subject.anatomy.moe_layers)


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_is_measured_and_learns(stock: Stock, name: str) -> None:
    """Its head alone makes the logits, and a router under training starts from what the model computes."""
    subject = open_subject(str(stock(name)))
    model = load_model(subject.checkpoint, subject.anatomy, Placement(torch.device("cpu"), torch.float32))
    tokens = torch.arange(40).reshape(2, 20)
    expected = our_logits(model, tokens, None)
    stream = Stream(Source.of_model(model, subject.anatomy))
    walk = Walk([stream], [Batch("text", (), tokens, None)])
    walk.through()
    for tail in walk.tail():
        assert torch.allclose(tail.logits(stream, 0, 0, 20), expected, atol=1e-5)
    with learning_routers(model, subject.anatomy, candidates=None) as routed:
        adapted = adapt_routers(model, subject.anatomy, rank=2)
        logits = adapted(input_ids=tokens, use_cache=False).logits
        assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert len(routed) == len(subject.anatomy.moe_layers)
        logits.square().mean().backward()
        trained = {key: value for key, value in adapted.named_parameters() if value.requires_grad}
        assert len(trained) == 2 * len(routed)
        assert all(value.grad.abs().max() > 0 for key, value in trained.items() if "lora_B" in key)
        assert {layer: tuple(weight.shape) for layer, weight in adapted_routers(adapted, subject.anatomy).items()} == (
            dict.fromkeys(subject.anatomy.moe_layers, (8, 64))
        )


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_run_says_so(stock: Stock, name: str) -> None:
    subject = open_subject(str(stock(name)))
    with pytest.raises(CheckpointError, match=r"cannot be run by moesurgeon: .*; inspect, retop") as error:
        load_model(subject.checkpoint, subject.anatomy, Placement(torch.device("cpu"), torch.float32))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NEW)
def test_parameters_and_flops_are_the_stock_models(stock: Stock, name: str) -> None:
    anatomy = open_subject(str(stock(name))).anatomy
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock_config(name))
    sizes = {key: tensor for key, tensor in model.named_parameters()} | {
        key: tensor for key, tensor in model.named_buffers() if key.endswith(("e_score_correction_bias", "expert_bias"))
    }
    routed = {key: tensor for key, tensor in sizes.items() if ".experts." in key}
    matrices = sum(tensor.numel() for key, tensor in routed.items() if not key.endswith("bias"))
    found, flops = count_parameters(anatomy), count_flops(anatomy)
    assert found.total == sum(tensor.numel() for tensor in sizes.values())
    assert found.experts == sum(tensor.numel() for tensor in routed.values())
    assert found.active == found.total - found.experts * 3 // 4  # top 2 of 8
    assert flops.routed_experts == 2 * matrices // 4
    assert flops.head == 2 * 128 * 64
    assert flops.router == 2 * 8 * 64 * len(anatomy.moe_layers)
    assert flops.attention > 0
    names = "|".join(("shared_expert", "shared_mlp", "shared_experts"))
    shared = sum(t.numel() for key, t in sizes.items() if re.search(names, key) and t.dim() > 1)
    assert flops.shared_experts == 2 * shared
    ends = {"embed_tokens", "wte"}
    all_matrices = sum(
        t.numel() for key, t in sizes.items() if t.dim() > 1 and not ends & set(key.split(".")) and key not in routed
    )
    biases = sum(t.numel() for key, t in sizes.items() if key.endswith("e_score_correction_bias") and t.dim() > 1)
    tied = 0 if any("lm_head" in key for key in sizes) else 128 * 64
    streams = sum(t.numel() for key, t in sizes.items() if "model.hc_head" in key and t.dim() > 1)
    assert flops.total - flops.routed_experts == 2 * (all_matrices + tied - biases - streams)


def test_a_list_of_top_ks_stays_a_list(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "source", "hunyuan_v1_moe", num_experts_per_tok=[2, 1, 3, 2])
    source = open_subject(str(folder))
    assert (source.anatomy.top_k, source.anatomy.top_ks) == (3, (2, 1, 3, 2))
    apply(plan_retop(source.anatomy, RetopSpec(top_k=2)), source.checkpoint, tmp_path / "retop")
    assert config_of(tmp_path / "retop")["moe_topk"] == [2, 1, 2, 2]
    assert logits_of(load_stock(tmp_path / "retop")).isfinite().all()
    with pytest.raises(CheckpointError, match="for 4 layers, not for 5"):
        (folder / "config.json").write_text(json.dumps({**config_of(folder), "num_hidden_layers": 5}))
        open_subject(str(folder))


def test_an_expert_that_a_table_names_cannot_go(stock: Stock, out: Path) -> None:
    source = open_subject(str(stock("deepseek_v4")))
    with pytest.raises(UsageError, match=r"layers.0.ffn.gate.tid2eid sends \d+ tokens to experts that were to be"):
        apply(plan_prune(source.anatomy, {**_kept(source), 0: (0, 1, 2, 3, 4, 6)}), source.checkpoint, out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["minimax_m2", "glm4_moe", "deepseek_v4"])
def test_scales_go_with_their_experts(stock: Stock, tmp_path: Path, name: str) -> None:
    quantised(stock(name), tmp_path / "fp8")
    if name == "deepseek_v4":  # its own spelling
        tensors = load_tensors(tmp_path / "fp8")
        renamed = {key.replace(".weight_scale_inv", ".scale"): value for key, value in tensors.items()}
        save_tensors(tmp_path / "fp8", config_of(tmp_path / "fp8"), renamed)
    source = open_subject(str(tmp_path / "fp8"))
    assert count_parameters(source.anatomy) == count_parameters(open_subject(str(stock(name))).anatomy)
    apply(plan_prune(source.anatomy, _kept(source)), source.checkpoint, tmp_path / "pruned")
    _same(load_tensors(tmp_path / "pruned"), _expected(load_tensors(source.root), _kept(source)))


def test_blocks_and_scales_of_gpt_oss_go_with_their_experts(stock: Stock, tmp_path: Path) -> None:
    """As GPT-OSS is published: MXFP4, gate and up as rows, 32 weights to a block, biases beside them."""
    tensors = load_tensors(stock("gpt_oss"))
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, ins, outs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, outs, ins // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(256, (experts, outs, ins // 32), dtype=torch.uint8)
    config = {**config_of(stock("gpt_oss")), "quantization_config": {"quant_method": "mxfp4"}}
    source = open_subject(str(save_tensors(tmp_path / "mxfp4", config, tensors)))
    assert count_parameters(source.anatomy) == count_parameters(open_subject(str(stock("gpt_oss"))).anatomy)
    apply(plan_prune(source.anatomy, KEPT), source.checkpoint, tmp_path / "pruned")
    _same(load_tensors(tmp_path / "pruned"), _expected(tensors, KEPT))


def test_experts_of_layers_that_nobody_described_are_not_overlooked(stock: Stock, tmp_path: Path) -> None:
    tensors = {**load_tensors(stock("qwen3_moe")), "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(32, 64)}
    with pytest.raises(CheckpointError, match=r"mtp.layers.0.mlp.experts.0.up_proj.weight belongs to the experts"):
        open_subject(str(save_tensors(tmp_path, config_of(stock("qwen3_moe")), tensors)))


def test_llama4_inside_the_multimodal_model(stock: Stock, tmp_path: Path) -> None:
    text = config_of(stock("llama4_text"))
    config = {"model_type": "llama4", "text_config": text, "vision_config": {"model_type": "llama4_vision_model"}}
    tensors = {f"language_model.{name}": tensor for name, tensor in load_tensors(stock("llama4_text")).items()}
    tensors["vision_model.layernorm_pre.weight"] = torch.ones(4)
    source = open_subject(str(save_tensors(tmp_path / "source", config, tensors)))
    kept = _kept(source)
    apply(plan_prune(source.anatomy, kept), source.checkpoint, tmp_path / "pruned")
    _same(load_tensors(tmp_path / "pruned"), _expected(tensors, kept))
    assert config_of(tmp_path / "pruned") == {**config, "text_config": {**text, "num_local_experts": 4}}
