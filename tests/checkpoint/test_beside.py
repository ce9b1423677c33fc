"""What lies beside the weights: whatever makes a loader take something else is named, and no copy has it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesurgeon.checkpoint.auxiliary import copy_auxiliary
from moesurgeon.checkpoint.beside import look_beside
from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.errors import CheckpointError
from tests.checkpoint.shards import CONFIG, INDEX, save_shards, some_tensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def _folder(tmp_path: Path, *, sharded: bool = True, **config: object) -> Path:
    tensors = some_tensors()
    parts = [{"t0": tensors["t0"]}, {"t1": tensors["t1"]}] if sharded else [tensors]
    return save_shards(tmp_path / "checkpoint", parts, {**CONFIG, **config})


def _stray(folder: Path, name: str = "model.safetensors") -> None:
    save_file({"t0": torch.ones(2)}, folder / name)


def _put(name: str, content: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / name).write_text(content)

    return put


@pytest.mark.parametrize(
    ("make", "config", "says"),
    [
        (_stray, {}, "transformers loads that one file"),
        (_put("adapter_config.json", "{}"), {}, "puts the adapter on top"),
        (_put("x", ""), {"transformers_weights": "other.safetensors"}, "names its weights itself"),
        (_put("x", ""), {"configuration_files": ["config.4.0.0.json"]}, "hands over to other files"),
        (_put("generation_config.json", "[]"), {}, "generation_config.json is not a JSON object"),
        (_put("tokenizer.json", '{"model": {"vocab": {"a": '), {}, "tokenizer.json is no whole JSON object"),
        (_put("tokenizer_config.json", ""), {}, "tokenizer_config.json is no whole JSON object"),
        (_put("added_tokens.json", "[1]\n"), {}, "added_tokens.json is no whole JSON object"),
    ],
)
def test_what_redirects_a_loader_is_named(
    tmp_path: Path, make: Callable[[Path], None], config: dict[str, object], says: str
) -> None:
    folder = _folder(tmp_path, **config)
    make(folder)
    (redirect,) = look_beside(open_checkpoint(folder)).redirects
    assert says in redirect


def test_an_index_of_the_single_file_alone_redirects_nobody(tmp_path: Path) -> None:
    folder = _folder(tmp_path, sharded=False)
    index = {"weight_map": dict.fromkeys(some_tensors(), "model.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    assert look_beside(open_checkpoint(folder)).redirects == ()


@pytest.mark.parametrize(
    ("name", "sharded", "is_named"),
    [
        ("model.fp16.safetensors", True, True),
        ("model-00001-of-00009.safetensors", True, True),
        ("mtp.safetensors", True, True),
        ("consolidated.safetensors", True, False),  # everybody goes by the index
        ("consolidated.safetensors", False, True),
    ],
)
def test_shards_of_nothing_are_named_where_some_loader_takes_them(
    tmp_path: Path, name: str, sharded: bool, is_named: bool
) -> None:
    folder = _folder(tmp_path, sharded=sharded)
    _stray(folder, name)
    beside = look_beside(open_checkpoint(folder))
    assert beside.redirects == ()
    assert any(name in warning for warning in beside.warnings) is is_named
    assert beside.left_out == (name,)


def test_code_that_is_promised_and_absent_is_named(tmp_path: Path) -> None:
    own = {"AutoConfig": "configuration_x.X", "AutoTokenizer": ["tokenization_x.X", None], "AutoModel": "a/b--model.X"}
    folder = _folder(tmp_path, auto_map=own)
    (folder / "configuration_x.py").write_text("")
    (warning,) = look_beside(open_checkpoint(folder)).warnings
    assert "auto_map names tokenization_x.py, which" in warning


def test_no_copy_has_what_would_redirect_its_loaders(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    stale = [
        "model.safetensors", "model.safetensors.index.fp16.json", "pytorch_model.bin.index.json", "params.json",
        "adapter_config.json", "config.4.0.0.json", "pytorch_model.bin", "consolidated.00.pth", "model.gguf",
    ]  # fmt: skip
    for name in [*stale, "tokenizer.json", "tekken.json", "merges.txt", ".hidden"]:
        (folder / name).write_text("{}")
    for name in ("original", "global_step10", ".cache", "additional_chat_templates"):
        (folder / name).mkdir()
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_auxiliary(folder, copy)
    assert {path.name for path in copy.iterdir()} == {
        "tokenizer.json", "tekken.json", "merges.txt", "additional_chat_templates",
    }  # fmt: skip
    (folder / "model.safetensors").unlink()  # is no safetensors file, and never opened
    beside = look_beside(open_checkpoint(folder))
    assert set(beside.left_out) == {*stale[1:], "original/", "global_step10/"}


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00002.safetensors", "tokenizer.json"])
def test_a_pointer_is_not_the_file(tmp_path: Path, name: str) -> None:
    folder = _folder(tmp_path)
    (folder / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} in .* is a Git LFS pointer, .*; run git lfs pull there"):
        open_checkpoint(folder)


def test_pointers_that_no_loader_reads_do_no_harm(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    for name in ("consolidated.safetensors", "picture.png", "pytorch_model.bin"):
        (folder / name).write_bytes(POINTER)
    open_checkpoint(folder)


def test_all_missing_shards_are_named_and_those_that_are_there(tmp_path: Path) -> None:
    tensors = some_tensors()
    folder = save_shards(tmp_path / "checkpoint", [{name: tensors[name]} for name in ("t0", "t1", "t2")])
    for number in (1, 3):
        (folder / f"model-0000{number}-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").symlink_to(tmp_path / "a blob that is not there")
    says = "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors are missing from .*"
    with pytest.raises(CheckpointError, match=says + r"1 of 3 shards \(model-00002-of-00003.safetensors\)"):
        open_checkpoint(folder)


def test_shards_without_an_index_are_told_from_nothing(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"but no model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def test_an_adapter_alone_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter, not a model; merge it"):
        open_checkpoint(tmp_path)
