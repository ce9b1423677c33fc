"""The one writer: what it wrote is read back, and what could not be written is not there."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.checkpoint.header import DTYPE_BITS, TensorSpec
from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.checkpoint.reader import fingerprint
from moesurgeon.errors import CheckpointError, MoeSurgeonError, OutputError, UsageError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery import apply as apply_module
from moesurgeon.surgery import edits
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, compose, identity
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.factory import load_tensors, save_checkpoint, save_tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A small random Mixtral in several shards."""
    return open_subject(str(save_checkpoint(tmp_path_factory.mktemp("source"), "mixtral")))


def _prune(source: Subject, count: int = 4) -> EditPlan:
    return plan_prune(source.anatomy, dict.fromkeys(source.anatomy.routed_layers, range(count)))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _raising(code: int) -> Callable[..., Any]:
    def refuse(*args: object, **kwargs: object) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


_read, _write = os.preadv, os.write


def _only_zeros(_source: int, buffers: list[memoryview], _offset: int) -> int:
    buffers[0][:] = bytes(len(buffers[0]))
    return len(buffers[0])


def _shifted(source: int, buffers: list[memoryview], offset: int) -> int:
    return _read(source, buffers, offset - 1)


def _one_byte_less(target: int, data: memoryview) -> int:
    _write(target, data[:-1])
    return len(data)


@pytest.mark.parametrize(
    ("call", "broken", "says"),
    [
        ("preadv", _only_zeros, "differs from its source after writing; nothing was left behind"),
        ("preadv", _shifted, "differs from its source after writing; nothing was left behind"),
        ("write", _one_byte_less, "did not read back"),
    ],
)
def test_a_write_that_went_wrong_is_caught(
    source: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, broken: Callable[..., int], says: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        with pytest.raises(OutputError, match=says):
            apply(_prune(source), source.checkpoint, tmp_path / "out")
    assert _names(tmp_path) == []


def test_an_index_that_went_wrong_is_caught(source: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = apply_module._index

    def incomplete(*args: Any) -> dict[str, Any]:
        index = real(*args)
        index["weight_map"].pop("model.norm.weight")
        return index

    monkeypatch.setattr(apply_module, "_index", incomplete)
    with pytest.raises(OutputError, match=r"did not read back: .*'model\.norm\.weight'"):
        apply(_prune(source), source.checkpoint, tmp_path / "out")
    assert _names(tmp_path) == []


def test_a_plan_whose_result_is_incomplete_is_caught(source: Subject, tmp_path: Path) -> None:
    """Even a plan that accounts for everything may drop what the result needs."""
    name = source.anatomy.router_weight(2)
    outputs = {key: output for key, output in identity(source.anatomy).outputs.items() if key != name}
    with pytest.raises(OutputError, match="is not complete: layer 2 has experts but no router weight"):
        apply(EditPlan(outputs, {name: "why not"}), source.checkpoint, tmp_path / "out")
    assert _names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["preadv", "write", "fsync", "rename", "write_text"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_full_disk_leaves_nothing(
    source: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, old: bool
) -> None:
    if old:
        apply(identity(source.anatomy), source.checkpoint, tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "write_text" else os, call, _raising(code))
        is_read = (call, code) == ("preadv", errno.EIO)  # that the disk is full is no fault of what is read
        says = f"cannot be read .{os.strerror(code)}" if is_read else f"{os.strerror(code)}.*nothing was left behind"
        with pytest.raises(CheckpointError if is_read else OutputError, match=says):
            apply(_prune(source), source.checkpoint, tmp_path / "out", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert _names(tmp_path) == (["out"] if old else [])


def _with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    source: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _prune(source)
    _with_free(monkeypatch, plan.nbytes - 1)
    monkeypatch.setattr(os, "write", _raising(errno.EIO))  # would be the next to complain
    with pytest.raises(OutputError, match=f"needs {plan.nbytes:,} bytes"):
        apply(plan, source.checkpoint, tmp_path / "out")
    assert _names(tmp_path) == []


def test_links_need_no_room(source: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_free(monkeypatch, 0)
    plan = plan_retop(source.anatomy, RetopSpec(top_k=1))
    written = apply(plan, source.checkpoint, tmp_path / "out", link=True)
    assert written.linked == written.shards > 1


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_not_possible_shards_are_copied(
    source: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "link", _raising(code))
    written = apply(identity(source.anatomy), source.checkpoint, tmp_path / "out", link=True)
    assert written.linked == 0
    assert fingerprint(open_checkpoint(tmp_path / "out")) == fingerprint(source.checkpoint)


def test_a_source_is_never_written_into(source: Subject) -> None:
    before = _names(source.root)
    for target in (source.root, source.root / "out"):
        with pytest.raises(UsageError, match="overlap"):
            apply(_prune(source), source.checkpoint, target, overwrite=True)
    assert _names(source.root) == before


def test_shards_with_nothing_left_go_away(tmp_path: Path) -> None:
    """The rest is numbered anew, and the index agrees."""
    folder = save_checkpoint(tmp_path / "source", "mixtral", num_hidden_layers=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = load_tensors(folder)
    shutil.rmtree(folder)
    save_tensors(folder, {}, {name: tensor for name, tensor in tensors.items() if ".experts.7." not in name})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_tensors(folder, {}, {name: tensor for name, tensor in tensors.items() if ".experts.7." in name})
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    places = {name: f"model-0000{1 + ('.experts.7.' in name)}-of-00002.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": places}))
    config = {"model_type": "mixtral", "num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2}
    config |= {"hidden_size": 64, "intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    source = open_subject(str(folder))
    written = apply(_prune(source, 7), source.checkpoint, tmp_path / "out")
    assert written.shards == 1
    assert [name for name in _names(tmp_path / "out") if name.endswith(".safetensors")] == [
        "model-00001-of-00001.safetensors"
    ]
    after = open_subject(str(tmp_path / "out"))
    assert after.anatomy.experts == 7
    assert load_tensors(after.root).keys() == {name for name in tensors if ".experts.7." not in name}
    stated = json.loads((after.root / "model.safetensors.index.json").read_text())["metadata"]
    assert stated == {"total_size": after.checkpoint.nbytes}


def test_one_file_stays_one_file_without_an_index(source: Subject, tmp_path: Path) -> None:
    folder = save_tensors(tmp_path / "source", source.checkpoint.config, load_tensors(source.root))
    single = open_subject(str(folder))
    apply(_prune(single), single.checkpoint, tmp_path / "out")
    assert _names(tmp_path / "out") == ["README.md", "config.json", "model.safetensors", "moesurgeon.json"]


def test_every_tensor_is_aligned_whatever_lies_beside_it(source: Subject, tmp_path: Path) -> None:
    """Runtimes map the file and read in place: a tensor of three bytes may not push the next one off."""
    outputs = dict(identity(source.anatomy).outputs)
    for name in list(outputs):
        odd = TensorSpec(f"{name}.odd", "U8", (3,))
        if ".experts." not in name:
            outputs[odd.name] = edits.add(odd, lambda: b"odd", key="odd", beside=name)
    apply(EditPlan(outputs), source.checkpoint, tmp_path / "out")
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert sum(tensor.dtype == "U8" for tensor in tensors.values()) > 10
    assert all(tensor.offset % (DTYPE_BITS[tensor.dtype] // 8) == 0 for tensor in tensors.values())


def test_provenance_names_the_source_and_every_dropped_tensor(source: Subject, tmp_path: Path) -> None:
    plan = _prune(source)
    apply(plan, source.checkpoint, tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "moesurgeon.json").read_text())
    assert recorded["schema_version"] == 1
    (step,) = recorded["history"]
    assert step["source"] == {"fingerprint": source.fingerprint, "bytes": source.checkpoint.nbytes}
    assert set(step["dropped"]) == set(source.anatomy.tensors) - {
        name for output in plan.outputs.values() for name in output.sources
    }
    assert step["operations"][0]["expert_map"] == {str(n): {str(e): e for e in range(4)} for n in range(4)}
    second = open_subject(str(tmp_path / "out"))
    apply(plan_retop(second.anatomy, RetopSpec(top_k=1)), second.checkpoint, tmp_path / "again")
    history = json.loads((tmp_path / "again" / "moesurgeon.json").read_text())["history"]
    assert history[0] == step
    assert history[1]["source"]["fingerprint"] == second.fingerprint


@pytest.mark.parametrize("content", ["{", "[]", '{"history": 3}', '{"history": [1]}', "\xff"])
def test_a_broken_record_in_the_source_is_no_bug_of_ours(source: Subject, tmp_path: Path, content: str) -> None:
    shutil.copytree(source.root, tmp_path / "source")
    (tmp_path / "source" / "moesurgeon.json").write_text(content, encoding="latin-1")
    broken = open_subject(str(tmp_path / "source"))
    try:
        apply(_prune(broken), broken.checkpoint, tmp_path / "out")
    except MoeSurgeonError as error:
        assert isinstance(error, CheckpointError)
        assert _names(tmp_path) == ["source"]


def test_what_surrounds_the_weights_comes_along(source: Subject, tmp_path: Path) -> None:
    shutil.copytree(source.root, tmp_path / "source")
    kept = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "modeling_x.py")
    left = ("pytorch_model.bin", "model.gguf", "old.index.json", ".hidden", "optimizer.pt")
    for name in (*kept, *left):
        (tmp_path / "source" / name).write_text("{}" if name == "tokenizer.json" else name)
    own = open_subject(str(tmp_path / "source"))
    apply(_prune(own), own.checkpoint, tmp_path / "out")
    assert set(kept) <= set(_names(tmp_path / "out"))
    assert not set(left) & set(_names(tmp_path / "out"))


def test_new_bytes_are_made_once_and_one_at_a_time(source: Subject, tmp_path: Path) -> None:
    """Every router replaced, then all of it fused: what is made is not held, nor made for each part anew."""
    made: list[str] = []
    outputs = dict(identity(source.anatomy).outputs)
    for layer in source.anatomy.moe_layers:
        spec = source.anatomy.tensors[source.anatomy.router_weight(layer)]

        def load(name: str = spec.name, size: int = spec.nbytes) -> bytes:
            made.append(name)
            return bytes(size)

        outputs[spec.name] = edits.replace(spec, load, key="zeros")
    plan = EditPlan(outputs)
    plan = compose(plan, plan_layout(plan.result(source.anatomy), "fused"))
    assert made == []
    apply(plan, source.checkpoint, tmp_path / "out")
    assert sorted(made) == [source.anatomy.router_weight(layer) for layer in source.anatomy.moe_layers]
    after = open_subject(str(tmp_path / "out"))
    routers = [load_tensors(after.root)[after.anatomy.router_weight(layer)] for layer in range(4)]
    assert all(torch.count_nonzero(router) == 0 for router in routers)


def test_chat_templates_come_along_and_links_in_their_folder_do_not(source: Subject, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source.root, copy)
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (copy / "additional_chat_templates" / "link.jinja").symlink_to("/etc/hostname")
    subject = open_subject(str(copy))
    apply(identity(subject.anatomy), subject.checkpoint, tmp_path / "out")
    copied = tmp_path / "out" / "additional_chat_templates"
    assert [path.name for path in copied.iterdir()] == ["tools.jinja"]
