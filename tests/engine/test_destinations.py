"""Every stored tensor has its place in the running model, and what has none is named before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesurgeon.engine.destinations import running_name
from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import Subject, open_subject
from tests.engine.small import source_of, stream_of
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, save_checkpoint, save_tensors
from tests.laws.walks import LAYOUTS, load_stock, logits_of, same, text, walked

Tensors = dict[str, torch.Tensor]
BATCHES = [text(20, 9)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_parts_of_every_parameter_are_all_of_it(name: str, stock: Stock) -> None:
    """Each stored tensor fills a part of its own, and no byte of a parameter is left out."""
    source = source_of(open_subject(str(stock(name))))
    assert source.destinations.pieces.keys() == source.skeleton.targets.keys()
    used = [piece.source for pieces in source.destinations.pieces.values() for piece in pieces]
    beyond = {n for n, role in source.anatomy.roles.items() if role.layer is not None and role.layer >= source.layers}
    assert sorted(used) == sorted(source.anatomy.tensors.keys() - beyond)
    for target, pieces in source.destinations.pieces.items():
        counts = torch.zeros(source.skeleton.targets[target].shape)
        for piece in pieces:
            part = piece.view(counts)
            assert part.is_contiguous()
            part += 1
            assert running_name(source.anatomy, piece.source) == target
        assert (counts == 1).all()


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_a_head_that_is_the_embedding_may_be_stored_as_well(model_type: str, factor: float, tmp_path: Path) -> None:
    """And where it turns out to be another one, that one is the head: as transformers has it."""
    folder = save_checkpoint(tmp_path / "tied", model_type, tie_word_embeddings=True)
    tensors = load_tensors(folder)
    head = {"lm_head.weight": factor * tensors["model.embed_tokens.weight"]}
    twice = save_tensors(tmp_path / "twice", config_of(folder), {**tensors, **head})
    expected = [logits_of(load_stock(twice), batch) for batch in BATCHES]
    assert same(walked([stream_of(open_subject(str(twice)))], BATCHES)[0], expected)


def _as_bytes(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 64, dtype=torch.uint8)


def _as_integers(tensors: Tensors) -> None:
    name = next(name for name in tensors if ".experts.3." in name)
    tensors[name] = tensors[name].to(torch.int8)


def _of_another_shape(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(64, 63)


def _surplus(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)


def _without_a_norm(tensors: Tensors) -> None:
    del tensors["model.layers.2.input_layernorm.weight"]


def _part_of_an_expert(tensors: Tensors) -> None:
    name = next(name for name in tensors if ".experts.3." in name)
    tensors[name.replace(".weight", ".weight_zeros")] = torch.zeros(1)


BROKEN: list[tuple[Callable[[Tensors], None], str]] = [
    (_as_bytes, r"q_proj.weight is stored as U8, which moesurgeon cannot run; dequantise"),
    (_as_integers, r"experts.3.*is stored as I8, which moesurgeon cannot run; dequantise"),
    (_of_another_shape, r"o_proj.weight has shape \[64, 63\], but by config.json .* has \[64, 64\]; restore"),
    (_surplus, "has the unknown model.layers.1.self_attn.q_proj.bias;"),
    (_without_a_norm, "lacks model.layers.2.input_layernorm.weight;"),
    (_part_of_an_expert, "weight_zeros is a part of experts that moesurgeon cannot run"),
]


@pytest.mark.parametrize(("damage", "says"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_what_has_no_place_is_named(damage: Callable[[Tensors], None], says: str, stock: Stock, tmp_path: Path) -> None:
    folder = stock("mixtral")
    tensors = load_tensors(folder)
    damage(tensors)
    subject: Subject = open_subject(str(save_tensors(tmp_path / "broken", config_of(folder), tensors)), complete=False)
    with pytest.raises(CheckpointError, match=says) as raised:
        source_of(subject)
    assert "\n" not in str(raised.value)


def test_a_shard_that_shrinks_on_the_way_is_noticed(stock: Stock, tmp_path: Path) -> None:
    folder = save_tensors(tmp_path / "model", config_of(stock("mixtral")), load_tensors(stock("mixtral")))
    source = source_of(open_subject(str(folder)))
    source.supply.allow(source.supply.least)
    path = folder / "model.safetensors"
    groups = source.supply.walk()
    next(groups)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)
    with pytest.raises(CheckpointError, match="became shorter while it was read; leave it alone and try again"):
        for _group in groups:
            pass
