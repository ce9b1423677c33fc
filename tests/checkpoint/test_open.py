"""A checkpoint folder is untrusted too: its index may not lead anywhere else, and must agree with the shards."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.errors import CheckpointError
from tests.checkpoint.shards import INDEX, bytes_of, save_shards, some_tensors

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _two_shards(folder: Path) -> Path:
    tensors = some_tensors()
    return save_shards(folder, [{n: tensors[n] for n in ("t0", "t1")}, {n: tensors[n] for n in ("t2", "t3", "t5")}])


def _index(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text())


def _write_index(folder: Path, **changes: str | None) -> None:
    """Change where the index places tensors; None removes them."""
    index = _index(folder)
    placed = {name: shard for name, shard in {**index["weight_map"], **changes}.items() if shard is not None}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": placed}))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_two_shards(tmp_path))
    assert set(checkpoint.tensors) == {"t0", "t1", "t2", "t3", "t5"}
    assert checkpoint.tensors["t3"].shard == TWO
    assert checkpoint.is_sharded
    assert checkpoint.nbytes == sum(tensor.nbytes for name, tensor in some_tensors().items() if name != "t4")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/outside.safetensors",
        "..\\outside.safetensors",
        "\0.safetensors",
        "x" * 300 + ".safetensors",
        "é" * 130 + ".safetensors",
    ],
)
def test_a_shard_that_is_no_plain_file_name_is_refused(tmp_path: Path, name: str) -> None:
    folder = _two_shards(tmp_path / "checkpoint")
    (tmp_path / "outside.safetensors").write_bytes((folder / ONE).read_bytes())
    _write_index(folder, t0=name, t1=name)
    with pytest.raises(CheckpointError, match="not a plain file name") as error:
        open_checkpoint(folder)
    assert len(str(error.value)) < 300


@given(st.text(max_size=12).map(lambda text: text + ".safetensors"))
@example(".safetensors")
@example("~/.safetensors")
@example("\ud83d.safetensors")
@example("model-00002-of-00002.safetensors")
def test_no_name_of_a_shard_breaks_anything(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-name"
    if not folder.exists():
        _two_shards(folder)
    weight_map = dict.fromkeys(("t0", "t1"), name) | dict.fromkeys(("t2", "t3", "t5"), TWO)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if name == ONE:
        assert open_checkpoint(folder).tensors
        return
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = _two_shards(tmp_path / "checkpoint")
    (folder / ONE).rename(tmp_path / ONE)
    (folder / ONE).symlink_to(tmp_path / ONE)
    with pytest.raises(CheckpointError, match="a link that leaves"):
        open_checkpoint(folder)


def test_a_link_that_is_not_a_shard_may_not_leave_either(tmp_path: Path) -> None:
    """It would be copied into the output, contents and all, and perhaps be published with it."""
    folder = _two_shards(tmp_path / "checkpoint")
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link that leaves"):
        open_checkpoint(folder)


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    folder = _two_shards(tmp_path)
    (folder / ONE).rename(folder / "blob")
    (folder / ONE).symlink_to("blob")
    assert "t0" in open_checkpoint(folder).tensors


def _hub_cache(home: Path) -> Path:
    """Lay the checkpoint out as the hub's cache does: a snapshot of links to blobs; return the snapshot."""
    snapshot, blobs = home / "snapshots" / "0123abc", home / "blobs"
    _two_shards(snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.join("..", "..", "blobs", str(number)))  # noqa: PTH118 - a relative link
    return snapshot


def test_a_snapshot_of_the_hub_cache_opens(tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path / "models--org--name")
    checkpoint = open_checkpoint(snapshot)
    with ShardReader(checkpoint) as reader:
        assert reader.read(checkpoint.tensors["t0"]) == bytes_of(some_tensors()["t0"])
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert open_checkpoint(link).tensors.keys() == checkpoint.tensors.keys()


def test_a_snapshot_may_not_reach_beyond_its_blobs(tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path / "models--org--name")
    (tmp_path / "elsewhere").write_bytes((snapshot / ONE).read_bytes())
    (snapshot / ONE).unlink()
    (snapshot / ONE).symlink_to("../../../elsewhere")
    with pytest.raises(CheckpointError, match="a link that leaves"):
        open_checkpoint(snapshot)


def test_swapped_shards_are_noticed(tmp_path: Path) -> None:
    folder = _two_shards(tmp_path)
    (folder / ONE).rename(folder / "aside")
    (folder / TWO).rename(folder / ONE)
    (folder / "aside").rename(folder / TWO)
    with pytest.raises(CheckpointError, match=f"places 't0' in {ONE}, but it is in {TWO}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / TWO).unlink(), f"{TWO} is missing from .*; there are 1 of 2 shards"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda folder: (folder / "config.json").write_text('{"a":1,"a":2}'), "names the same key twice"),
        (lambda folder: _write_index(folder, t0=None), "holds 't0' that .* does not list"),
        (lambda folder: _write_index(folder, t9=ONE), f"promises 't9' in {ONE}, which does not hold it"),
        (lambda folder: _write_index(folder, t0=TWO), f"places 't0' in {TWO}, but it is in {ONE}"),
        (lambda folder: _write_index(folder, t0="pytorch_model.bin"), "is no safetensors file"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": ["a"]}'), "has no weight_map"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"t0": 1}}'), "is no safetensors file"),
        (lambda folder: (folder / INDEX).write_text("[" * 100_000), "is not valid JSON"),
        (lambda folder: (folder / TWO).write_bytes((folder / ONE).read_bytes()), f"is in both {ONE} and {TWO}"),
        (lambda folder: _replaced_by_folder(folder / ONE), "is not a regular file"),
        (lambda folder: _replaced_by_pipe(folder / ONE), "is not a regular file"),
        (lambda folder: _replaced_by_pipe(folder / "config.json"), "is not a regular file"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, damage: Any, says: str) -> None:
    folder = _two_shards(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder)


def _replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever


def test_a_json_bomb_is_not_read(tmp_path: Path) -> None:
    folder = _two_shards(tmp_path)
    for name in ("config.json", INDEX):
        before = (folder / name).read_bytes()
        with (folder / name).open("wb") as file:
            file.truncate(2**33)  # sparse: takes no space
        with pytest.raises(CheckpointError, match="no file of a checkpoint"):
            open_checkpoint(folder)
        (folder / name).write_bytes(before)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.write_text, (tmp_path / "sprung", "x"))

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"holds pickled weights \(pytorch_model.bin\), .* never opened; convert"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_pickled_weights_beside_safetensors_do_not_matter(tmp_path: Path) -> None:
    folder = _two_shards(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert open_checkpoint(folder).tensors


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("x"), "is a file; give the folder"),
        (lambda path: path.mkdir(), "config.json is missing"),
        (lambda path: save_shards(path, [{}]), "holds no tensors"),
    ],
)
def test_what_is_no_checkpoint_is_told_so(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "it")
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path / "it")


def test_a_folder_without_weights_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a safetensors checkpoint"):
        open_checkpoint(tmp_path)


def test_a_shard_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_two_shards(tmp_path))
    with ShardReader(checkpoint) as reader:
        reader.read(checkpoint.tensors["t2"])
        os.truncate(tmp_path / TWO, 100)
        with pytest.raises(CheckpointError, match="became shorter while it was read"):
            [reader.read(tensor) for tensor in checkpoint.headers[TWO].tensors]
