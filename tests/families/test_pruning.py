"""Pruning in every family and layout: all that counts experts shrinks in step, and the routing rule holds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.errors import UsageError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.prune import check_count, plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, save_checkpoint
from tests.families.running import load_stock, logits_expert_by_expert, logits_of

MTP = "model.layers.4."
# Of 8 experts in two groups (0-3 and 4-7), as many of each; another choice in every layer.
KEPT = {0: (0, 2, 5, 6), 1: (0, 2, 5, 6), 2: (1, 2, 4, 7), 3: (0, 3, 4, 5), 4: (2, 3, 6, 7)}


def _pruned(subject: Subject, target: Path) -> Subject:
    kept = {layer: KEPT[layer] for layer in subject.anatomy.routed_layers}
    apply(plan_prune(subject.anatomy, kept), subject.checkpoint, target)
    return open_subject(str(target))


def _expected(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what pruning by ``KEPT`` makes of ``tensors``: a second opinion, by indexing with torch."""
    result = {}
    for key, tensor in tensors.items():
        layer = re.search(r"\.layers\.(\d+)\.", key)
        kept = KEPT[int(layer[1])] if layer else ()
        per_expert = re.search(r"(.*\.experts\.)(\d+)(\..*)", key)
        is_shared = "shared_expert" in key
        if per_expert and not is_shared:
            if int(per_expert[2]) in kept:
                result[f"{per_expert[1]}{kept.index(int(per_expert[2]))}{per_expert[3]}"] = tensor
        elif not is_shared and (".gate.weight" in key or "e_score" in key or ".experts." in key):
            result[key] = tensor[list(kept)]
        else:
            result[key] = tensor
    return result


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "mixtral fused",
        "mixtral mxfp4",
        "deepseek",
        "deepseek_v2",
        "deepseek_v2 fused",
        "deepseek_v3",
        "deepseek_v3 fused",
        "deepseek_v3 fp8",
        "qwen2_moe",
        "qwen2_moe fused",
    ],
)
def test_everything_that_counts_experts_shrinks_in_step(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    pruned = _pruned(source, out)
    expected, found = _expected(load_tensors(source.root)), load_tensors(out)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].view(torch.uint8), tensor.contiguous().view(torch.uint8)), key
    before, after = config_of(source.root), config_of(out)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key in source.anatomy.family.experts_keys if key in before}
    assert pruned.anatomy.experts == 4
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    "name", ["mixtral", "deepseek", "deepseek_v2", "deepseek_v3", "qwen2_moe", "deepseek_v3 fused"]
)
def test_pruning_is_masking(stock: Stock, out: Path, name: str) -> None:
    """Bit for bit, group limits, selection bias and all: two groups, of which each token sees one."""
    source = open_subject(str(stock(name)))
    _pruned(source, out)
    dropped = {layer: sorted(set(range(8)) - set(KEPT[layer])) for layer in source.anatomy.moe_layers}
    masked = logits_expert_by_expert(load_stock(source.root, MTP), dropped)
    assert torch.equal(logits_expert_by_expert(load_stock(out, MTP)), masked)
    assert not torch.equal(logits_expert_by_expert(load_stock(source.root, MTP)), masked), "the mask did nothing"


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_no_token_leaves_its_groups(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    _pruned(source, out)
    model, seen = load_stock(out, MTP), []
    for module in model.modules():
        if hasattr(module, "num_group"):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output[2]))
    logits_of(model)
    groups = torch.cat(seen) // 2  # two experts are left in each group
    assert groups.shape[1] == 2
    assert torch.equal(groups[:, 0], groups[:, 1])


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek", "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_the_layouts_are_the_same_weights(stock: Stock, tmp_path: Path, model_type: str) -> None:
    """What we fuse is what transformers fuses, and what we take apart is what it takes apart."""
    per_expert, fused = open_subject(str(stock(model_type))), open_subject(str(stock(f"{model_type} fused")))
    apply(plan_layout(fused.anatomy, "per-expert"), fused.checkpoint, tmp_path / "apart")
    apply(plan_layout(per_expert.anatomy, "fused"), per_expert.checkpoint, tmp_path / "joined")
    for ours, theirs in (("apart", per_expert), ("joined", fused)):
        expected = {key: value for key, value in load_tensors(theirs.root).items() if not key.startswith(MTP)}
        found = {key: value for key, value in load_tensors(tmp_path / ours).items() if not key.startswith(MTP)}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_layer_for_multi_token_prediction_follows_the_last_one(stock: Stock, out: Path) -> None:
    source = open_subject(str(stock("deepseek_v3")))
    kept = {layer: KEPT[layer] for layer in source.anatomy.moe_layers}
    apply(plan_prune(source.anatomy, kept), source.checkpoint, out)
    before, after = load_tensors(source.root), load_tensors(out)
    gate = f"{MTP}mlp.gate.weight"
    assert torch.equal(after[gate], before[gate][list(KEPT[3])])
    history = json.loads((out / "moesurgeon.json").read_text())["history"]
    assert history[0]["operations"][0]["expert_map"]["4"] == {str(old): new for new, old in enumerate(KEPT[3])}


@pytest.mark.parametrize(
    ("name", "kept", "says"),
    [
        ("deepseek_v3", 3, "3 experts do not fit the routing groups .*; possible are 4, 6, 8"),
        ("deepseek_v3", 2, "at least 2.*possible are 4, 6, 8"),  # the best two of each group make its score
        ("deepseek_v2", 5, "possible are 4, 6, 8"),  # 2 would leave one in the group that a token sees
        ("mixtral", 1, "keep at least 2 experts"),
        ("mixtral", 9, "cannot keep 9 experts"),
        ("mixtral", 0, "keep at least 2"),
        ("mixtral", -1, "keep at least 2"),
    ],
)
def test_counts_that_could_not_run_are_refused(stock: Stock, name: str, kept: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_count(open_subject(str(stock(name))).anatomy, kept)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_the_groups_that_a_token_sees_must_hold_enough(tmp_path: Path, model_type: str) -> None:
    """Stock transformers would take experts of other groups instead, and not say so."""
    anatomy = open_subject(str(save_checkpoint(tmp_path, model_type, num_experts_per_tok=4))).anatomy
    with pytest.raises(UsageError, match="6 experts leave 3 in the 1 groups that a token sees, but it is routed to 4"):
        check_count(anatomy, 6)


def test_groups_must_lose_the_same_number(stock: Stock) -> None:
    anatomy = open_subject(str(stock("deepseek_v3"))).anatomy
    kept = {**{layer: KEPT[layer] for layer in anatomy.moe_layers}, 2: (0, 1, 2, 5)}
    with pytest.raises(UsageError, match="layer 2 keeps different counts in its 2 routing groups"):
        plan_prune(anatomy, kept)


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [
        ("deepseek_v3", {"n_group": 1}, 2),  # one is not enough for the sum of two, even of a single group
        ("deepseek_v2", {}, 2),
        ("deepseek_v2", {"topk_method": "greedy"}, 1),
        ("mixtral", {}, 1),
        ("qwen2_moe", {}, 1),
    ],
)
def test_the_smallest_count_that_is_accepted_runs(
    tmp_path: Path, name: str, config: dict[str, Any], count: int
) -> None:
    """Top-1 of as few experts as are allowed runs in stock transformers; where stock fails, we refuse."""
    source = open_subject(str(save_checkpoint(tmp_path / "source", name, num_experts_per_tok=1, **config)))
    groups = source.anatomy.groups[0]
    first = [expert for expert in range(8) if expert % (8 // groups) < count // groups]
    kept = dict.fromkeys(source.anatomy.routed_layers, first)
    apply(plan_prune(source.anatomy, kept), source.checkpoint, tmp_path / "pruned")
    assert logits_of(load_stock(tmp_path / "pruned")).isfinite().all()
    with pytest.raises(UsageError):
        check_count(source.anatomy, count - 1)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ({}, "no experts are given for layer 0"),
        ({0: (0, 1), 1: (0, 1), 2: (0, 1)}, "no experts are given for layer 3"),
        ({layer: (0, 1) for layer in range(5)}, "layer 4 has no routed experts"),
        ({0: (0, 1, 2), 1: (0, 1), 2: (0, 1), 3: (0, 1)}, "different counts"),
        ({layer: (0, 8) for layer in range(4)}, "has no expert 8: they are numbered 0 to 7"),
        ({layer: (-1, 0) for layer in range(4)}, "has no expert -1"),
        ({layer: (0, 0, 1) for layer in range(4)}, "names an expert twice"),
        ({layer: (0,) for layer in range(4)}, "keep at least 2 experts"),
        ({layer: () for layer in range(4)}, "keep at least 2 experts"),
    ],
)
def test_choices_that_make_no_sense_are_refused(stock: Stock, kept: dict[int, tuple[int, ...]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan_prune(open_subject(str(stock("mixtral"))).anatomy, kept)


def test_a_choice_without_the_last_layer_is_refused_with_multi_token_prediction(stock: Stock) -> None:
    anatomy = open_subject(str(stock("deepseek_v3"))).anatomy
    with pytest.raises(UsageError, match="no experts are given for layer 3"):
        plan_prune(anatomy, {1: KEPT[1], 2: KEPT[2]})


@pytest.mark.parametrize("top_k", [0, 3, -1])
def test_retop_only_takes_experts_away(stock: Stock, top_k: int) -> None:
    with pytest.raises(UsageError, match="between 1 and the checkpoint's 2"):
        plan_retop(open_subject(str(stock("mixtral"))).anatomy, RetopSpec(top_k=top_k))


def test_keeping_everything_changes_nothing(stock: Stock) -> None:
    anatomy = open_subject(str(stock("deepseek_v3"))).anatomy
    assert plan_prune(anatomy, dict.fromkeys(anatomy.moe_layers, range(8))).changes_nothing
    assert plan_retop(anatomy, RetopSpec(top_k=anatomy.top_k)).changes_nothing


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek", "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_every_alias_of_a_key_is_edited(tmp_path: Path, model_type: str) -> None:
    """Readers differ in the name that they look for; both names with different values is a trap."""
    folder = save_checkpoint(tmp_path / "source", model_type)
    anatomy = open_subject(str(folder)).anatomy
    aliases = anatomy.family.experts_keys
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **dict.fromkeys(aliases, 8)}))
    source = open_subject(str(folder))
    apply(plan_prune(source.anatomy, {n: KEPT[n] for n in anatomy.moe_layers}), source.checkpoint, tmp_path / "pruned")
    assert {config_of(tmp_path / "pruned")[alias] for alias in aliases} == {4}
    assert logits_of(load_stock(tmp_path / "pruned")).isfinite().all()
