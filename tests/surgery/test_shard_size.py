"""``--shard-size``: files of at most so many bytes, with the tensors that were planned and nothing else."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.plan import identity
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.shards import plan_shards
from tests.families.factory import load_tensors, save_checkpoint, save_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(str(save_checkpoint(tmp_path_factory.mktemp("source"), "mixtral")))


def _shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


@given(st.integers(1, 3_000_000))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_tensor_once_and_no_file_too_large(source: Subject, size: int) -> None:
    plan = identity(source.anatomy)
    shards = plan_shards(plan, source.checkpoint, size)
    assert sorted(output.spec.name for shard in shards for output in shard.outputs) == sorted(plan.outputs)
    assert all(shard.nbytes <= size or len(shard.outputs) == 1 for shard in shards)
    names = [shard.name for shard in shards]
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)] or (
        names == ["model.safetensors"]
    )
    # The order is the source's: what lay in one file still lies together.
    homes = [[source.checkpoint.tensors[output.home].shard for output in shard.outputs] for shard in shards]
    assert [min(home) for home in homes] == sorted(min(home) for home in homes)


@pytest.mark.parametrize("size", [1, 100_000, 10**9])
@pytest.mark.parametrize("single", [False, True], ids=["sharded", "single"])
def test_a_result_of_another_size_verifies(source: Subject, tmp_path: Path, size: int, single: bool) -> None:
    own = source
    if single:
        own = open_subject(str(save_tensors(tmp_path / "s", source.checkpoint.config, load_tensors(source.root))))
    plan = plan_prune(own.anatomy, dict.fromkeys(own.anatomy.routed_layers, (1, 3, 4)))
    apply(plan, own.checkpoint, tmp_path / "plain")
    written = apply(plan, own.checkpoint, tmp_path / "sized", shard_size=size)
    before, after = load_tensors(tmp_path / "plain"), load_tensors(tmp_path / "sized")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    report = verify(str(tmp_path / "sized"), str(own.root))
    assert report["tensors_equal"] == report["tensors"]
    if size == 10**9:
        assert _shards(tmp_path / "sized") == ["model.safetensors"]
        assert not (tmp_path / "sized" / INDEX).exists()
    else:
        assert len(_shards(tmp_path / "sized")) == written.shards > 1
        index = json.loads((tmp_path / "sized" / INDEX).read_text())
        assert index["metadata"]["total_size"] == open_checkpoint(tmp_path / "sized").nbytes
    if size == 1:
        assert written.shards == len(after)


def test_a_file_that_comes_out_the_same_can_still_be_linked(source: Subject, tmp_path: Path) -> None:
    single = open_subject(str(save_tensors(tmp_path / "s", source.checkpoint.config, load_tensors(source.root))))
    written = apply(identity(single.anatomy), single.checkpoint, tmp_path / "out", link=True, shard_size=10**9)
    assert (written.linked, written.shards) == (1, 1)
