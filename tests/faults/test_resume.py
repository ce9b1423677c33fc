"""The same command takes over what a killed or failed run has finished; no other command does."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.checkpoint import parallel, resume
from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.checkpoint.writer import ShardPlan, content_key
from moesurgeon.cli.output import answer, answering
from moesurgeon.errors import OutputError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery import edits
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.exact import doubled
from moesurgeon.surgery.plan import EditPlan, compose
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.shards import compiled, plan_shards
from tests.faults.forked import ended, forked, kill_at
from tests.faults.synthetic import hashes

STAGING = ".out.moesurgeon"
pytestmark = pytest.mark.usefixtures("one_at_a_time")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _killed_after(shards: int, work: Callable[[], object]) -> None:
    def die() -> None:
        kill_at(resume, "write_shard", shards + 1)()
        work()

    assert ended(forked(die)) == -9


def test_finished_shards_are_taken_over(
    source: Subject, plan: EditPlan, clean: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = partial(apply, plan, source.checkpoint, tmp_path / "out")
    _killed_after(3, work)
    assert _names(tmp_path) == [".out.moesurgeon", ".out.moesurgeon.lock"]
    again: list[str] = []
    real = resume.write_shard

    def counted(shard: ShardPlan, *rest: object) -> None:
        again.append(shard.name)
        real(shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(resume, "write_shard", counted)
    written = work()
    assert (written.resumed, written.shards) == (3, 6)
    assert again == [f"model-{number:05d}-of-00006.safetensors" for number in (4, 5, 6)]
    assert hashes(tmp_path / "out") == clean


@pytest.mark.parametrize("damage", ["truncated", "longer", "header", "empty", "link"])
def test_a_damaged_shard_is_written_again(
    source: Subject, plan: EditPlan, clean: dict[str, str], tmp_path: Path, damage: str
) -> None:
    work = partial(apply, plan, source.checkpoint, tmp_path / "out")
    _killed_after(3, work)
    shard = tmp_path / ".out.moesurgeon" / "model-00002-of-00006.safetensors"
    raw = shard.read_bytes()
    shard.unlink()
    if damage == "link":
        shard.hardlink_to(source.checkpoint.path_of(shard.name))
    else:
        shard.write_bytes(
            {"truncated": raw[:-1], "longer": raw + b"x", "header": raw[:50] + b"X" + raw[51:], "empty": b""}[damage]
        )
    assert work().resumed == 2
    assert hashes(tmp_path / "out") == clean


def _other_plan(subject: Subject, plan: EditPlan) -> dict[str, Any]:
    kept = dict.fromkeys(subject.anatomy.routed_layers, (0, 1, 2, 3, 4, 5))
    return {"plan": plan_prune(subject.anatomy, kept)}


def _touched(subject: Subject, plan: EditPlan) -> dict[str, Any]:
    path = subject.checkpoint.path_of("model-00006-of-00006.safetensors")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    return {}


def _edited(subject: Subject, plan: EditPlan) -> dict[str, Any]:
    config = subject.root / "config.json"
    config.write_text(config.read_text().replace("{", '{"note": 1, ', 1))
    return {}


@pytest.mark.parametrize(
    "change",
    [_other_plan, _touched, _edited, lambda *_: {"shard_size": 10**7}, lambda *_: {"link": True}],
    ids=["plan", "source", "config", "shard size", "link"],
)
def test_another_command_takes_nothing_over(
    source: Subject, plan: EditPlan, tmp_path: Path, change: Callable[..., dict[str, Any]]
) -> None:
    shutil.copytree(source.root, tmp_path / "source", copy_function=shutil.copy2)
    own = open_subject(str(tmp_path / "source"))
    _killed_after(3, partial(apply, plan, own.checkpoint, tmp_path / "out"))
    options = {"plan": plan, "target": tmp_path / "out", **change(own, plan)}
    own = open_subject(str(tmp_path / "source"))
    assert apply(source=own.checkpoint, **options).resumed == 0
    apply(source=own.checkpoint, **{**options, "target": tmp_path / "clean"})
    assert hashes(tmp_path / "out") == hashes(tmp_path / "clean")
    assert _names(tmp_path) == ["clean", "out", "source"]


def _with_router(subject: Subject, byte: bytes) -> EditPlan:
    """What recovery plans: a router's new bytes, known by their hash; the table of another cut, by its numbers."""
    outputs = {name: edits.copy(spec) for name, spec in subject.anatomy.tensors.items()}
    spec = subject.anatomy.tensors[subject.anatomy.router_weight(0)]
    outputs[spec.name] = edits.replace(spec, lambda: byte * spec.nbytes, key=content_key(byte * spec.nbytes))
    norm = subject.anatomy.tensors["model.layers.1.input_layernorm.weight"]
    outputs[norm.name] = edits.transform(norm, doubled(norm))
    return EditPlan(outputs)


@pytest.fixture
def finite(source: Subject, tmp_path: Path) -> Subject:
    """The source with numbers that can be doubled."""
    folder = tmp_path / "source"
    shutil.copytree(source.root, folder)
    norm = source.checkpoint.tensors["model.layers.1.input_layernorm.weight"]
    with (folder / norm.shard).open("r+b") as file:
        file.seek(norm.offset)
        file.write(bytes(norm.nbytes - 2) + b"\x80\x3f")
    return open_subject(str(folder))


def test_shards_with_bytes_made_anew_are_taken_over(finite: Subject, tmp_path: Path) -> None:
    """Both kinds, in shards 2 and 3: bytes in memory, and a function of the source's."""
    work = partial(apply, _with_router(finite, b"a"), finite.checkpoint)
    _killed_after(3, partial(work, tmp_path / "out"))
    assert work(tmp_path / "out").resumed == 3
    work(tmp_path / "clean")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "clean")


def test_other_new_bytes_are_another_command(finite: Subject, tmp_path: Path) -> None:
    """Another training gives other routers to the same plan."""
    _killed_after(3, partial(apply, _with_router(finite, b"a"), finite.checkpoint, tmp_path / "out"))
    assert apply(_with_router(finite, b"b"), finite.checkpoint, tmp_path / "out").resumed == 0
    apply(_with_router(finite, b"b"), finite.checkpoint, tmp_path / "clean")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "clean")


def test_a_key_tells_functions_and_cuts_apart(source: Subject) -> None:
    """Parts of parts too: a cut through something made anew is part of what it is called."""
    assert doubled(TensorSpec("w", "F32", (4,))).key != doubled(TensorSpec("w", "BF16", (4,))).key
    first = _with_router(source, b"a")
    router = first.outputs[source.anatomy.router_weight(0)]
    digests = set()
    for kept in ([0, 1, 2], [0, 1, 3], [2, 1, 0]):
        outputs = {name: edits.copy(output.spec) for name, output in first.outputs.items()}
        outputs[router.spec.name] = edits.select(router.spec, 0, kept)
        plan = compose(first, EditPlan(outputs))
        with ShardReader(source.checkpoint) as reader:
            shards = [compiled(shard, source.checkpoint, reader) for shard in plan_shards(plan, source.checkpoint)]
        digests.add(resume.digest_of(shards, source.checkpoint, "", link=False))
    assert len(digests) == 3


def test_a_full_disk_keeps_what_is_finished(
    source: Subject, plan: EditPlan, clean: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, []

    def filling(*arguments: Any, **options: Any) -> int:
        calls.append(1)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "full")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", filling)
        with pytest.raises(OutputError, match=r"free space, then the same command goes on from the \d finished"):
            apply(plan, source.checkpoint, tmp_path / "out")
    assert _names(tmp_path) == [STAGING]
    assert apply(plan, source.checkpoint, tmp_path / "out").resumed > 0
    assert hashes(tmp_path / "out") == clean


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("shard", [1, 3, 6])
def test_a_disk_that_refuses_one_shard(
    source: Subject,
    plan: EditPlan,
    clean: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    at_once: int,
    shard: int,
) -> None:
    """The error arrives whichever thread it happened in, and only whole shards have names."""
    monkeypatch.setattr(parallel, "AT_ONCE", at_once)
    real = os.fsync

    def failing(file: int) -> None:
        if f"model-{shard:05d}" in writing.get(threading.get_ident(), ""):
            raise OSError(errno.EIO, "broken")
        real(file)

    writing: dict[int, str] = {}
    write = resume.write_shard

    def noted(plan: ShardPlan, *rest: Any) -> None:
        writing[threading.get_ident()] = plan.name
        write(plan, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        patch.setattr(resume, "write_shard", noted)
        with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
            apply(plan, source.checkpoint, tmp_path / "out")
    named = {path.name: hashes(path.parent)[path.name] for path in (tmp_path / STAGING).glob("*.safetensors")}
    assert named.items() <= clean.items() and f"model-{shard:05d}-of-00006.safetensors" not in named
    assert apply(plan, source.checkpoint, tmp_path / "out").resumed == len(named)
    assert hashes(tmp_path / "out") == clean


def test_ctrl_c_says_that_the_same_command_goes_on(
    source: Subject,
    plan: EditPlan,
    clean: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = resume.write_shard

    def interrupted(shard: ShardPlan, *rest: Any) -> None:
        if shard.name.startswith("model-00004"):
            raise KeyboardInterrupt
        real(shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "write_shard", interrupted)
        code = answering(
            False,
            lambda: answer(False, lambda progress: apply(plan, source.checkpoint, tmp_path / "out"), print),  # type: ignore[arg-type,return-value]
        )
    assert code == 130
    told = capsys.readouterr().err
    assert told.startswith("moesurgeon: interrupted; the same command goes on from the 3 finished shards in ")
    assert len(told.splitlines()) == 1
    assert _names(tmp_path) == [STAGING]
    assert apply(plan, source.checkpoint, tmp_path / "out").resumed == 3
    assert hashes(tmp_path / "out") == clean


def test_a_write_that_does_not_verify_is_not_taken_over(
    source: Subject, plan: EditPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards have right headers and sizes, but are known to be wrong."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda source, buffers, offset: len(buffers[0]))  # what was in the buffer
        with pytest.raises(OutputError, match="differs from its source"):
            apply(plan, source.checkpoint, tmp_path / "out")
    assert _names(tmp_path) == []
