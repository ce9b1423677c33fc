"""Shards are written as ranges of other shards, whichever way the kernel offers."""

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moesurgeon.checkpoint.copying import Appender
from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.checkpoint.open import Checkpoint, open_checkpoint
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.checkpoint.writer import FileRange, Fresh, PlannedTensor, ShardPlan, beginning, joined, write_shard
from moesurgeon.errors import CheckpointError
from tests.checkpoint.shards import bytes_of, save_shards, some_tensors

WAYS = ("copy_file_range", "sendfile")


def _whole(checkpoint: Checkpoint, names: list[str]) -> ShardPlan:
    """Plan a shard of these tensors as they are, in this order."""
    tensors = [checkpoint.tensors[name] for name in names]
    planned = [PlannedTensor(TensorSpec(t.name, t.dtype, t.shape), (_range(checkpoint, t.name),)) for t in tensors]
    return ShardPlan("out.safetensors", tuple(planned), {"format": "pt"})


def _range(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> FileRange:
    tensor = checkpoint.tensors[name]
    return FileRange(tensor.shard, tensor.offset + start, (tensor.nbytes if stop is None else stop) - start)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tensors = list(some_tensors().items())
    return open_checkpoint(save_shards(tmp_path / "source", [dict(tensors[:3]), dict(tensors[3:])]))


def _refusing(code: int) -> Callable[..., int]:
    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
@pytest.mark.parametrize("refused", [(), WAYS[:1], WAYS[1:], WAYS])
def test_every_way_of_copying_gives_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...], code: int
) -> None:
    for way in refused:
        monkeypatch.setattr(os, way, _refusing(code))
    moved: list[float] = []
    plan = _whole(checkpoint, sorted(checkpoint.tensors))
    with ShardReader(checkpoint) as reader:
        write_shard(plan, reader, tmp_path / plan.name, moved.append)
    written, expected = load_file(tmp_path / plan.name), some_tensors()
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        assert bytes_of(written[name]) == bytes_of(tensor)
    assert sum(moved) == plan.nbytes


def test_a_way_that_gives_up_half_way_is_continued_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(300_000)
    (tmp_path / "source").write_bytes(data)
    real, calls = os.copy_file_range, []

    def short(source: int, target: int, count: int, offset_src: int) -> int:
        calls.append(count)
        if len(calls) == 3:
            raise OSError(errno.EINVAL, "enough")
        return real(source, target, min(count, 1000), offset_src=offset_src)

    monkeypatch.setattr(os, "copy_file_range", short)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        Appender(target.fileno(), lambda done: None).copy(source.fileno(), 4096, 200_000, "source")
    assert (tmp_path / "target").read_bytes() == data[4096:204_096]
    assert len(calls) == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_real_error_is_no_reason_to_try_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, code: int
) -> None:
    if way == "sendfile":
        monkeypatch.setattr(os, "copy_file_range", _refusing(errno.EXDEV))
    monkeypatch.setattr(os, way, _refusing(code))
    (tmp_path / "source").write_bytes(bytes(5000))
    with (
        (tmp_path / "source").open("rb") as source,
        (tmp_path / "target").open("wb") as target,
        pytest.raises(OSError, match=os.strerror(code)),
    ):
        Appender(target.fileno(), lambda done: None).copy(source.fileno(), 0, 5000, "source")


@pytest.mark.parametrize("refused", [(), WAYS[:1], WAYS])
@pytest.mark.parametrize("start", [0, 5, 4096, 5000])
def test_ranges_are_copied_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...], start: int
) -> None:
    for way in refused:
        monkeypatch.setattr(os, way, _refusing(errno.EXDEV))
    data = os.urandom(3_000_000)
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        file = Appender(target.fileno(), lambda done: None)
        for offset in (start, 0):
            file.copy(source.fileno(), offset, 2_500_001, "source")
    assert (tmp_path / "target").read_bytes() == data[start : start + 2_500_001] + data[:2_500_001]


@pytest.mark.parametrize("refused", [(), WAYS[:1], WAYS])
def test_a_source_that_shrinks_is_noticed(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]
) -> None:
    for way in refused:
        monkeypatch.setattr(os, way, _refusing(errno.EXDEV))
    name = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].nbytes)
    plan = _whole(checkpoint, [name])
    os.truncate(checkpoint.path_of(checkpoint.tensors[name].shard), checkpoint.tensors[name].offset + 10)
    with ShardReader(checkpoint) as reader, pytest.raises(CheckpointError, match="became shorter"):
        write_shard(plan, reader, tmp_path / plan.name, lambda done: None)


@given(st.permutations(sorted(some_tensors())))
@settings(deadline=None)  # every example waits for the disk
def test_the_order_in_a_file_means_nothing(tmp_path_factory: pytest.TempPathFactory, order: list[str]) -> None:
    """Whatever order tensors are written in, the file holds the same tensors, for us and for the library."""
    folder = tmp_path_factory.mktemp("order")
    source = open_checkpoint(save_shards(folder, [some_tensors()]))
    (folder / "again").mkdir()
    (folder / "again" / "config.json").write_text("{}")
    with ShardReader(source) as reader:
        write_shard(_whole(source, order), reader, folder / "again" / "model.safetensors", lambda done: None)
    again = open_checkpoint(folder / "again")
    with ShardReader(source) as one, ShardReader(again) as other:
        for name, tensor in source.tensors.items():
            assert other.read(again.tensors[name]) == one.read(tensor)
    full = [name for name in order if source.tensors[name].nbytes]
    assert [name for name in again.tensors if again.tensors[name].nbytes] == full
    assert load_file(folder / "again" / "model.safetensors").keys() == source.tensors.keys()


@pytest.mark.parametrize("cut", [0, 8, 4096, 5000])
def test_what_lay_in_whole_blocks_does_after_a_cut(tmp_path: Path, cut: int) -> None:
    """The header is as long as that takes, and still one that others read."""
    tensors = {"a": torch.arange(cut, dtype=torch.uint8), "b": torch.rand(50_000), "c": torch.rand(3)}
    source = open_checkpoint(save_shards(tmp_path / "source", [tensors]))
    plan = _whole(source, ["b", "c"])
    with ShardReader(source) as reader:
        header, size = beginning(plan, reader)
        write_shard(plan, reader, tmp_path / "out.safetensors", lambda done: None)
    assert len(header) % 8 == 0 and (tmp_path / "out.safetensors").stat().st_size == size
    assert len(header) % 4096 == source.tensors["b"].offset % 4096
    assert bytes_of(load_file(tmp_path / "out.safetensors")["b"]) == bytes_of(tensors["b"])


def test_new_bytes_lie_between_copied_ones(checkpoint: Checkpoint, tmp_path: Path) -> None:
    spec = TensorSpec("mixed", "U8", (40,))
    parts = (_range(checkpoint, "t0", 0, 10), Fresh(20, lambda: b"\xab" * 20, "ab"), _range(checkpoint, "t0", 30, 40))
    plan = ShardPlan("out.safetensors", (PlannedTensor(spec, parts),), {})
    with ShardReader(checkpoint) as reader:
        write_shard(plan, reader, tmp_path / plan.name, lambda done: None)
        source = reader.read(checkpoint.tensors["t0"])
    written = load_file(tmp_path / plan.name)["mixed"].numpy().tobytes()
    assert written == source[:10] + b"\xab" * 20 + source[30:40]


PARTS = st.lists(
    st.builds(FileRange, st.sampled_from(["a", "b"]), st.integers(0, 12), st.integers(0, 4))
    | st.integers(0, 3).map(lambda length: Fresh(length, lambda: b"x" * length, "x")),
    max_size=12,
)


@given(PARTS)
def test_joining_ranges_keeps_the_bytes_and_leaves_nothing_to_join(parts: list[FileRange | Fresh]) -> None:
    shards = {"a": bytes(range(16)), "b": bytes(range(100, 116))}

    def content_of(some: list[FileRange | Fresh]) -> bytes:
        return b"".join(
            part.load() if isinstance(part, Fresh) else shards[part.shard][part.offset : part.offset + part.length]
            for part in some
        )

    found = list(joined(parts))
    assert content_of(found) == content_of(parts)
    assert all(part.length for part in found)
    for one, other in itertools.pairwise(found):
        if isinstance(one, FileRange) and isinstance(other, FileRange):
            assert (one.shard, one.offset + one.length) != (other.shard, other.offset)


def test_neighbours_are_copied_in_one_piece(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    monkeypatch.setattr(Appender, "copy", lambda self, source, offset, length, shard: copied.append(length))
    shard = checkpoint.headers["model-00001-of-00002.safetensors"]
    with ShardReader(checkpoint) as reader:
        plan = _whole(checkpoint, [tensor.name for tensor in shard.tensors])
        write_shard(plan, reader, tmp_path / plan.name, lambda done: None)
    assert copied == [plan.nbytes]


def test_an_existing_file_is_never_written_over(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = _whole(checkpoint, ["t0"])
    (tmp_path / plan.name).write_text("mine")
    with ShardReader(checkpoint) as reader, pytest.raises(FileExistsError):
        write_shard(plan, reader, tmp_path / plan.name, lambda done: None)
    assert (tmp_path / plan.name).read_text() == "mine"


def test_a_plan_that_does_not_fill_its_tensor_is_our_bug(checkpoint: Checkpoint) -> None:
    with pytest.raises(AssertionError, match="planned with 10 bytes"):
        PlannedTensor(TensorSpec("t", "U8", (11,)), (_range(checkpoint, "t0", 0, 10),))
