"""``verify`` proves a result against its source: bytes, config, and the record of what was done."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.errors import InputError, MoeSurgeonError, OutputError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery import edits
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, compose, identity
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.factory import save_checkpoint
from tests.surgery.verified import KEPT, copied, edited, forge


@pytest.mark.parametrize("layout", ["per-expert", "fused", "qwen2-moe"])
def test_what_was_written_verifies(source: Subject, tmp_path: Path, layout: str) -> None:
    written = apply(edited(source, layout), source.checkpoint, tmp_path / "out")
    report = verify(str(written.folder), str(source.root))
    result = open_subject(str(written.folder))
    assert report["tensors_equal"] == report["tensors"] == len(result.anatomy.tensors)
    assert report["tensors_replaced"] == 0
    assert report["tensors_dropped"] == 3 * 4 * 3
    assert report["fingerprint"] == result.fingerprint


def test_a_history_of_several_steps_verifies_against_each(source: Subject, tmp_path: Path) -> None:
    last = source
    for number, make in enumerate(
        (
            lambda anatomy: plan_retop(anatomy, RetopSpec(top_k=1)),
            lambda anatomy: plan_prune(anatomy, KEPT),
            lambda anatomy: plan_layout(anatomy, "fused"),
        )
    ):
        apply(make(last.anatomy), last.checkpoint, tmp_path / str(number))
        last = open_subject(str(tmp_path / str(number)))
    for earlier in (source.root, tmp_path / "0", tmp_path / "1"):
        report = verify(str(last.root), str(earlier))
        assert report["tensors_equal"] == len(last.anatomy.tensors)


@pytest.mark.parametrize("where", [0.0, 0.37, 0.5, 0.999999])
def test_one_flipped_bit_anywhere_in_a_kept_tensor_is_found(
    source: Subject, pruned: Path, tmp_path: Path, where: float
) -> None:
    folder = copied(pruned, tmp_path / "out")
    before = open_subject(str(folder))
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    tensor = before.checkpoint.tensors[name]
    with before.checkpoint.path_of(tensor.shard).open("r+b") as file:
        file.seek(tensor.offset + int(where * tensor.nbytes))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(OutputError, match=f"{name} differs from"):
        verify(str(folder), str(source.root))
    clean = verify(str(pruned), full=True)["hashes"]
    if where != 0.37:  # the fingerprint samples start, middle and end
        with pytest.raises(OutputError, match="a tensor was changed after"):
            verify(str(folder), full=True)
        return
    found = verify(str(folder), full=True)["hashes"]
    assert {key for key in clean if clean[key] != found[key]} == {name}
    forge(folder, lambda record: _with_hashes(record, clean))
    with pytest.raises(OutputError, match=f"{name}' is not what"):
        verify(str(folder), full=True)
    forge(folder, lambda record: _with_hashes(record, found))
    assert verify(str(folder), full=True)["hashes_compared"] == len(found)


def _with_hashes(record: Any, hashes: dict[str, str]) -> Any:
    record["history"][-1]["result"]["hashes"] = hashes
    return record


def test_hashes_are_of_the_bytes_of_each_tensor(pruned: Path) -> None:
    checkpoint = open_checkpoint(pruned)
    with ShardReader(checkpoint) as reader:
        raw = {name: reader.read(tensor) for name, tensor in checkpoint.tensors.items()}
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in raw.items()}
    report = verify(str(pruned), full=True)
    assert report["hashes"] == expected and report["hashes_compared"] == 0
    assert "hashes" not in verify(str(pruned))


@pytest.mark.parametrize("stated", [1, "many", -1, 10**30])
def test_an_index_with_another_size_is_warned_of(pruned: Path, tmp_path: Path, stated: object) -> None:
    folder = copied(pruned, tmp_path / "out")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "metadata": {"total_size": stated}}))
    assert [warning for warning in verify(str(folder))["warnings"] if "the shards hold" in warning]
    path.write_text(json.dumps({**index, "metadata": {}}))
    assert verify(str(folder))["warnings"] == []


def test_another_source_is_refused(source: Subject, pruned: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "deepseek", seed=1)
    with pytest.raises(InputError, match="its record names other fingerprints"):
        verify(str(pruned), str(other))
    with pytest.raises(InputError, match=r"has no moesurgeon\.json"):
        verify(str(source.root), str(other))


def _with_new_routers(source: Subject) -> EditPlan:
    """Return a plan as recovery makes it: new router weights, of which the record has only the names."""
    outputs = dict(identity(source.anatomy).outputs)
    names = [source.anatomy.router_weight(layer) for layer in source.anatomy.moe_layers]
    for name in names:
        spec = source.anatomy.tensors[name]
        outputs[name] = edits.replace(spec, lambda size=spec.nbytes: bytes(size), key="zeros")
    return EditPlan(outputs, record=[{"operation": "recover", "replaced": names}])


def test_replaced_tensors_are_counted_also_when_they_were_cut_later(source: Subject, tmp_path: Path) -> None:
    apply(_with_new_routers(source), source.checkpoint, tmp_path / "recovered")
    recovered = open_subject(str(tmp_path / "recovered"))
    apply(plan_prune(recovered.anatomy, KEPT), recovered.checkpoint, tmp_path / "pruned")
    for folder, against, replaced in (("recovered", source, 3), ("pruned", source, 3), ("pruned", recovered, 0)):
        report = verify(str(tmp_path / folder), str(against.root))
        assert report["tensors_replaced"] == replaced
        assert report["tensors_equal"] == report["tensors"] - replaced


def test_what_lies_beside_replaced_bytes_is_compared(source: Subject, tmp_path: Path) -> None:
    """One expert's matrix replaced and then fused with the others: those still have to be the source's."""
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    outputs = dict(identity(source.anatomy).outputs)
    spec = source.anatomy.tensors[name]
    outputs[name] = edits.replace(spec, lambda: bytes(spec.nbytes), key="zeros")
    plan = EditPlan(outputs, record=[{"operation": "recover", "replaced": [name]}])
    plan = compose(plan, plan_layout(plan.result(source.anatomy), "fused"))
    apply(plan, source.checkpoint, tmp_path / "out")
    assert verify(str(tmp_path / "out"), str(source.root))["tensors_replaced"] == 1
    fused = open_subject(str(tmp_path / "out"))
    tensor = fused.checkpoint.tensors["model.layers.2.mlp.experts.down_proj"]
    with fused.checkpoint.path_of(tensor.shard).open("r+b") as file:
        file.seek(tensor.offset + 5 * tensor.nbytes // 8)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(OutputError, match=r"experts\.down_proj differs from"):
        verify(str(fused.root), str(source.root))


def test_what_is_incomplete_does_not_verify(pruned: Path, tmp_path: Path) -> None:
    folder = copied(pruned, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_routed_experts": 5}))
    with pytest.raises(OutputError, match=r"does not verify: .*config.json counts 5 experts.*and \d+ more"):
        verify(str(folder))
    with pytest.raises(MoeSurgeonError):
        verify(str(tmp_path / "nowhere"))
