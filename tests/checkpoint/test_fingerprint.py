"""The fingerprint tells checkpoints apart by what they are, not by how they are stored."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.checkpoint.reader import fingerprint
from tests.checkpoint.shards import CONFIG, save_shards, some_tensors

TENSORS = {name: tensor for name, tensor in some_tensors(12).items() if tensor.numel()}


def _of(folder: Path) -> str:
    return fingerprint(open_checkpoint(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of all tensors in one file."""
    return _of(save_shards(tmp_path_factory.mktemp("whole"), [TENSORS]))


@given(st.lists(st.integers(0, 3), min_size=len(TENSORS), max_size=len(TENSORS)))
def test_it_does_not_depend_on_the_sharding(
    tmp_path_factory: pytest.TempPathFactory, whole: str, places: list[int]
) -> None:
    parts = [
        {name: tensor for place, (name, tensor) in zip(places, TENSORS.items(), strict=True) if place == number}
        for number in sorted(set(places))
    ]
    assert _of(save_shards(tmp_path_factory.mktemp("shards"), parts)) == whole


def test_it_does_not_depend_on_the_order_of_the_config(tmp_path: Path, whole: str) -> None:
    assert _of(save_shards(tmp_path, [TENSORS], dict(reversed(CONFIG.items())))) == whole


def test_it_changes_with_every_tensor(tmp_path: Path, whole: str) -> None:
    seen = {whole}
    for name, tensor in TENSORS.items():
        changed = (tensor.double() + 1).to(tensor.dtype)
        seen.add(_of(save_shards(tmp_path / name, [{**TENSORS, name: changed}])))
    assert len(seen) == len(TENSORS) + 1


@pytest.mark.parametrize("position", [0, 700, 1399], ids=["start", "middle", "end"])
def test_it_samples_large_tensors_in_three_places(tmp_path: Path, position: int) -> None:
    large = torch.zeros(1400, dtype=torch.uint8)
    before = _of(save_shards(tmp_path / "before", [{"large": large}]))
    large[position] = 1
    assert _of(save_shards(tmp_path / "after", [{"large": large}])) != before


def test_it_changes_with_names_shapes_and_dtypes(tmp_path: Path, whole: str) -> None:
    first = next(iter(TENSORS))
    others = {name: tensor for name, tensor in TENSORS.items() if name != first}
    variants = [
        others,
        {**others, "other": TENSORS[first]},
        {**others, first: TENSORS[first].flatten()},
        {**others, first: TENSORS[first].view(torch.float16)},
    ]
    seen = {_of(save_shards(tmp_path / str(number), [variant])) for number, variant in enumerate(variants)}
    assert len(seen | {whole}) == len(variants) + 1


def test_two_tensors_cannot_trade_places(tmp_path: Path) -> None:
    one, two = torch.zeros(4), torch.ones(4)
    there = _of(save_shards(tmp_path / "there", [{"a": one, "b": two}]))
    assert _of(save_shards(tmp_path / "here", [{"a": two, "b": one}])) != there


@pytest.mark.parametrize("config", [{**CONFIG, "num_hidden_layers": 3}, {**CONFIG, "new": None}, {}])
def test_it_changes_with_the_config(tmp_path: Path, whole: str, config: dict[str, object]) -> None:
    assert _of(save_shards(tmp_path, [TENSORS], config)) != whole
