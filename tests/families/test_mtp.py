"""Layers for multi-token prediction: pruned in step, by their own list or the last layer's, whatever their names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_layers import MtpModel

from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import logits_of as our_logits
from moesurgeon.engine.whole import load_model
from moesurgeon.errors import CheckpointError, InputError, UsageError
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.prune import PruneSpec, prune
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, save_checkpoint, save_tensors
from tests.families.running import load_stock, logits_of, tokens_for
from tests.families.second_opinion import KEPT, kept_of, pruned, same
from tests.families.variants import with_mtp_layer

# Numbered on behind the last layer, which stock models leave aside at the depths of the releases only...
NUMBERED = ("deepseek_v3 mtp", "glm4_moe mtp", "glm4_moe_lite mtp", "minimax_m2 mtp")
# ... and under names of their own, which they leave aside whatever the depth.
NAMED = ("ernie4_5_moe mtp", "deepseek_v4 mtp")


def _file(folder: Path, kept: dict[int, tuple[int, ...]]) -> Path:
    path = folder / "kept.json"
    path.write_text(json.dumps({str(layer): list(experts) for layer, experts in kept.items()}))
    return path


@pytest.mark.parametrize("name", [*NUMBERED, *NAMED])
def test_they_are_told_apart(stock: Stock, name: str) -> None:
    anatomy = open_subject(str(stock(name))).anatomy  # complete
    without = open_subject(str(stock(name.removesuffix(" mtp")))).anatomy
    assert (anatomy.moe_layers, anatomy.mtp_layers) == (without.moe_layers, (4,))
    extra = set(anatomy.tensors) - set(without.tensors)
    assert {anatomy.roles[tensor].layer for tensor in extra} == {4}


@pytest.mark.parametrize("name", [*NUMBERED, *NAMED])
def test_without_a_list_of_their_own_they_follow_the_last_layer(stock: Stock, tmp_path: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    chosen = {layer: KEPT[layer] for layer in source.anatomy.moe_layers}
    spec = PruneSpec(keep_experts=_file(tmp_path, chosen))
    report = prune(source.name, spec, Writing(output=tmp_path / "out"))
    kept = {**chosen, 4: KEPT[max(chosen)]}
    same(load_tensors(tmp_path / "out"), pruned(load_tensors(source.root), kept))
    assert report["kept"] == {str(layer): list(experts) for layer, experts in kept.items()}
    said = f"layer 4 chooses (multi-token prediction) as layer {max(chosen)}: nothing was measured there"
    assert any(warning.startswith(said) for warning in report["warnings"])
    history = json.loads((tmp_path / "out" / "moesurgeon.json").read_text())["history"]
    assert history[0]["operations"][0]["expert_map"]["4"] == {str(old): new for new, old in enumerate(kept[4])}


@pytest.mark.parametrize("name", [*NUMBERED, *NAMED])
def test_a_list_may_name_them(stock: Stock, tmp_path: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    spec = PruneSpec(keep_experts=_file(tmp_path, kept_of(source)))
    report = prune(source.name, spec, Writing(output=tmp_path / "out"))
    same(load_tensors(tmp_path / "out"), pruned(load_tensors(source.root), kept_of(source)))
    assert not any("multi-token" in warning for warning in report["warnings"])
    ignore = "model.layers.4." if name in NUMBERED else None
    assert logits_of(load_stock(tmp_path / "out", ignore)).isfinite().all()


@pytest.mark.parametrize("name", [*NUMBERED, *NAMED])
def test_they_keep_as_many_as_the_others(stock: Stock, tmp_path: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    spec = PruneSpec(keep_experts=_file(tmp_path, {**kept_of(source), 4: (0, 1, 2, 4, 5, 6)}))
    with pytest.raises(InputError, match=r"layers keep different counts \(\[4, 6\]\)"):
        prune(source.name, spec, Writing(output=tmp_path / "out"))


@pytest.mark.parametrize("name", ["deepseek_v3 mtp", "deepseek_v4 mtp"])
def test_the_last_layer_cannot_be_left_to_them(stock: Stock, name: str) -> None:
    anatomy = open_subject(str(stock(name))).anatomy
    kept = {layer: KEPT[layer] for layer in anatomy.routed_layers if layer != 3}
    with pytest.raises(UsageError, match="no experts are given for layer 3"):
        plan_prune(anatomy, kept)


@pytest.mark.parametrize("name", [*NUMBERED, *NAMED])
def test_fewer_experts_per_token_leaves_their_tensors_alone(stock: Stock, out: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    apply(plan_retop(source.anatomy, RetopSpec(top_k=1)), source.checkpoint, out)
    before = {key: value for key, value in load_tensors(source.root).items() if not key.endswith("tid2eid")}
    same({key: value for key, value in load_tensors(out).items() if not key.endswith("tid2eid")}, before)


@pytest.mark.parametrize("name", [*NUMBERED, "ernie4_5_moe mtp"])
def test_they_change_their_layout_with_the_others(stock: Stock, tmp_path: Path, name: str) -> None:
    source = open_subject(str(stock(name)))
    apply(plan_layout(source.anatomy, "fused"), source.checkpoint, tmp_path / "joined")
    joined = open_subject(str(tmp_path / "joined"))
    assert joined.anatomy.mtp_layers == (4,)
    assert len(list(joined.anatomy.of_kind("fused", layer=4))) == 2
    apply(plan_layout(joined.anatomy, "per-expert"), joined.checkpoint, tmp_path / "apart")
    same(load_tensors(tmp_path / "apart"), load_tensors(source.root))


def test_one_without_experts_stays_as_it_is(stock: Stock, tmp_path: Path) -> None:
    """As ERNIE 4.5 has it where the layer is built like the first, dense one."""
    source = open_subject(str(with_mtp_layer(stock("ernie4_5_moe"), tmp_path / "source", dense=True)))
    assert source.anatomy.mtp_layers == ()
    apply(plan_prune(source.anatomy, kept_of(source)), source.checkpoint, tmp_path / "out")
    before = {key: value for key, value in load_tensors(source.root).items() if "mtp" in key}
    same({key: value for key, value in load_tensors(tmp_path / "out").items() if "mtp" in key}, before)
    assert len(before) > 3


@pytest.mark.parametrize("name", ["deepseek_v3 mtp", "ernie4_5_moe mtp"])
def test_models_run_without_them(stock: Stock, name: str) -> None:
    subject = open_subject(str(stock(name)))
    model = load_model(subject.checkpoint, subject.anatomy, Placement(torch.device("cpu"), torch.float32))
    expected = load_stock(stock(name.removesuffix(" mtp")))
    tokens = tokens_for(expected)
    assert torch.allclose(our_logits(model, tokens, None), logits_of(expected), atol=1e-4)


def test_a_numbered_layer_that_nobody_counts_is_refused(stock: Stock, tmp_path: Path) -> None:
    config = {**config_of(stock("glm4_moe mtp")), "num_nextn_predict_layers": 0}
    with pytest.raises(CheckpointError, match=r"counts 4 layers, but layers \[4\] are stored as well"):
        open_subject(str(save_tensors(tmp_path, config, load_tensors(stock("glm4_moe mtp")))))


def _drafts(folder: Path, dropped: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what stock's own multi-token prediction drafts after some tokens, and the logits of it."""
    model = load_stock(folder)
    drafter: Any = MtpModel.from_pretrained(model)
    gate = drafter.layers[0].mtp_block.mlp.gate
    gate.e_score_correction_bias.data[list(dropped)] = -1e30
    tokens = tokens_for(model)
    with torch.no_grad():
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        positions = torch.arange(1, tokens.shape[1])[None].expand(len(tokens), -1)
        # Of every token but the last the state, and the token that came next.
        drafts, logits, _loss = drafter(tokens[:, 1:], states[:, :-1], None, positions, None)
    return drafts, logits


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [("glm4_moe", 46), ("deepseek_v3", 61)],  # the depths at which stock knows the layer behind the last
)
def test_pruning_is_masking_in_stock_drafts(tmp_path: Path, model_type: str, layers: int) -> None:
    """transformers 5.23 can draft with these layers, from the main model's config: the counts must agree."""
    plain = save_checkpoint(
        tmp_path / "plain", model_type, num_hidden_layers=layers, first_k_dense_replace=layers - 1, n_group=1
    )
    source = open_subject(str(with_mtp_layer(plain, tmp_path / "source")))
    assert (source.anatomy.moe_layers, source.anatomy.mtp_layers) == ((layers - 1,), (layers,))
    kept = {layers - 1: (0, 1, 2, 3, 4, 5), layers: (1, 2, 4, 5, 6, 7)}
    apply(plan_prune(source.anatomy, kept), source.checkpoint, tmp_path / "pruned")
    # The states that the layer starts from must be those of the pruned model: there experts 6 and 7 are gone.
    tensors = load_tensors(source.root)
    tensors[f"model.layers.{layers - 1}.mlp.gate.e_score_correction_bias"][[6, 7]] = -1e30
    masked = save_tensors(tmp_path / "masked", config_of(source.root), tensors)
    drafts, logits = _drafts(tmp_path / "pruned")
    expected_drafts, expected = _drafts(masked, dropped=(0, 3))
    assert torch.equal(drafts, expected_drafts)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not torch.allclose(logits, _drafts(masked)[1], atol=1e-2), "the mask did nothing"
