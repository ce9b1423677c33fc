"""Results of every family in stock transformers, those that moesurgeon itself does not run included."""

import json
from pathlib import Path

import pytest
import torch

from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.families import FAMILIES
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.prune import PruneSpec, prune
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.plan import compose
from moesurgeon.surgery.prune import check_count, plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.conftest import Stock
from tests.families.factory import MODEL_TYPES, config_of, load_tensors, save_checkpoint, save_tensors
from tests.families.running import load_stock, logits_expert_by_expert, logits_of, tokens_for
from tests.families.second_opinion import flat, kept_of, same, table_by_loop

TWO_WAYS = [f"{name} fused" for family in FAMILIES if len(family.layouts) == 2 for name in family.model_types]
EVERYTHING = [*MODEL_TYPES, *TWO_WAYS, "deepseek_v4 saved", "deepseek_v4 fused"]


# DBRX takes its softmax outside its router, where it cannot be made free of rounding; DeepSeek-V4's first
# layer has no choice to mask. Both agree to rounding, see below.
@pytest.mark.parametrize("name", [name for name in EVERYTHING if name.split()[0] not in ("dbrx", "deepseek_v4")])
def test_pruning_is_masking(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    kept = kept_of(source)
    apply(plan_prune(source.anatomy, kept), source.checkpoint, out)
    dropped = {layer: sorted(set(range(8)) - set(experts)) for layer, experts in kept.items()}
    whole = load_stock(source.root)
    before = logits_expert_by_expert(whole)
    masked = logits_expert_by_expert(whole, dropped)
    assert torch.equal(logits_expert_by_expert(load_stock(out)), masked)
    assert not torch.equal(before, masked), "the mask did nothing"


@pytest.mark.parametrize("name", ["dbrx", "deepseek_v4", "deepseek_v4 saved", "deepseek_v4 fused"])
def test_pruning_is_masking_to_rounding(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    kept = kept_of(source)
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
        else:  # the same substitutes for experts that are there all the while
            table = masked.get_submodule("model.layers.0.mlp.gate").tid2eid
            table.copy_(torch.tensor(experts)[torch.tensor(table_by_loop(table.tolist(), experts))])
    assert torch.allclose(logits_of(load_stock(out)), logits_of(masked), atol=1e-4)
    assert not torch.allclose(before, logits_of(masked), atol=1e-2)


@pytest.mark.parametrize("name", EVERYTHING)
def test_results_load_and_generate_in_stock_transformers(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    plan = plan_prune(source.anatomy, kept_of(source))
    if source.anatomy.family.fixed_top_k is None:
        plan = compose(plan, plan_retop(plan.result(source.anatomy), RetopSpec(top_k=1)))
    apply(plan, source.checkpoint, out)
    model = load_stock(out)  # asserts that no key is missing or unexpected
    start = tokens_for(model, rows=1, length=4)
    longer = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=3, min_new_tokens=3, pad_token_id=0
    )
    assert longer.shape == (1, 7)


@pytest.mark.parametrize("name", [name for name in EVERYTHING if not name.startswith("phimoe")])
def test_top_1_is_the_stock_model_with_the_key_edited_by_hand(stock: Stock, tmp_path: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    apply(plan_retop(source.anatomy, RetopSpec(top_k=1)), source.checkpoint, tmp_path / "retop")
    config = config_of(source.root)
    name = name.split(maxsplit=1)[0]
    holder = config["ffn_config"] if name == "dbrx" else config
    key = {"dbrx": "moe_top_k", "ernie4_5_moe": "moe_k", "hunyuan_v1_moe": "moe_topk"}.get(name, "num_experts_per_tok")
    assert holder[key] == 2
    holder[key] = 1
    assert config_of(tmp_path / "retop") == config
    assert list(flat(config_of(tmp_path / "retop"))) == list(flat(config))
    tensors = {
        tensor: value[:, :1] if tensor.endswith("tid2eid") else value
        for tensor, value in load_tensors(source.root).items()
    }
    same(load_tensors(tmp_path / "retop"), tensors)
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


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_a_table_costs_is_said(stock: Stock, tmp_path: Path, dry_run: bool) -> None:
    source = open_subject(str(stock("deepseek_v4")))
    choice = tmp_path / "kept.json"
    choice.write_text(json.dumps(kept_of(source)))
    report = prune(source.name, PruneSpec(keep_experts=choice), Writing(output=tmp_path / "out", dry_run=dry_run))
    assert [warning for warning in report["warnings"] if "table" in warning] == [
        "layer 0 chooses by a table from token to experts: the entries of pruned experts (about 50%) are given evenly "
        "to those that stay; the cost cannot be measured, moesurgeon does not run DeepSeek-V4"
    ]
    assert report["plan"]["operations"][0]["tables"]["names"] == ["layers.0.ffn.gate.tid2eid"]
    assert (tmp_path / "out").exists() is not dry_run


def test_fewer_experts_per_token_and_fewer_experts_are_one_table(stock: Stock, tmp_path: Path) -> None:
    """Either after the other, in one plan or two: every step sees the table that the one before it left."""
    source = open_subject(str(stock("deepseek_v4")))
    first = plan_retop(source.anatomy, RetopSpec(top_k=1))
    second = plan_prune(first.result(source.anatomy), kept_of(source))
    apply(compose(first, second), source.checkpoint, tmp_path / "at once")
    apply(first, source.checkpoint, tmp_path / "first")
    between = open_subject(str(tmp_path / "first"))
    apply(plan_prune(between.anatomy, kept_of(source)), between.checkpoint, tmp_path / "second")
    same(load_tensors(tmp_path / "at once"), load_tensors(tmp_path / "second"))
    assert verify(str(tmp_path / "second"), source.name)["tensors_replaced"] == 0
    assert load_tensors(tmp_path / "second")["layers.0.ffn.gate.tid2eid"].shape == (128, 1)
