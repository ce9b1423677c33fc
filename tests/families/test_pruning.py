"""What may be pruned: the routing rule holds in what is accepted, and what could not run is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.errors import UsageError
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.prune import check_count, plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.conftest import Stock
from tests.families.factory import config_of, save_checkpoint
from tests.families.running import load_stock, logits_of
from tests.families.second_opinion import KEPT, kept_of


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_no_token_leaves_its_groups(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, out)
    model, seen = load_stock(out), []
    for module in model.modules():
        if hasattr(module, "num_group"):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output[2]))
    logits_of(model)
    groups = torch.cat(seen) // 2  # two experts are left in each group
    assert groups.shape[1] == 2
    assert torch.equal(groups[:, 0], groups[:, 1])


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
