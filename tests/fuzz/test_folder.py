"""Any change to any file of a checkpoint: understood or refused, and nothing is written elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthetic import Geometry, make_checkpoint
from moesurgeon.checkpoint.open import CONFIG_NAME, INDEX_NAME, PROVENANCE_NAME
from moesurgeon.errors import MoeSurgeonError, UsageError
from moesurgeon.pipeline.inspect import inspect
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.completeness import problems_of
from moesurgeon.surgery.layouts import LAYOUTS, plan_layout
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.factory import save_checkpoint
from tests.families.variants import with_mtp_layer
from tests.fuzz.mutate import (
    BYTES,
    MUTATIONS,
    header_of,
    mutated,
    spoiled,
    with_header,
    writes_only_to,
    written,
)

KINDS = ("per-expert", "fused", "fp8", "deepseek", "deepseek_v3", "qwen2_moe")
SMALL = Geometry(hidden=16, width=16, experts=8, vocabulary=32)
FUZZ = settings(derandomize=True, database=None, deadline=None, max_examples=50)


@dataclass(frozen=True, repr=False)
class Victim:
    """A pruned checkpoint to spoil, and the ``source`` that it was made from."""

    folder: Path
    source: Path
    kept: Path
    experts: int

    @property
    def shard(self) -> Path:
        return sorted(self.folder.glob("*.safetensors"))[0]


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Victim]:
    return {kind: _victim(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def _victim(kind: str, folder: Path) -> Victim:
    source = folder / "source"
    if kind in ("per-expert", "fused", "fp8"):
        make_checkpoint(source, 40_000, layout=kind, shard_bytes=20_000, geometry=SMALL)
    else:
        save_checkpoint(source, kind, num_hidden_layers=2)
        if kind == "deepseek_v3":
            source = with_mtp_layer(source, folder / "extended")
    anatomy = open_subject(str(source)).anatomy
    kept = folder / "kept.json"
    half = [expert for expert in range(anatomy.experts) if expert % 4 < 2]  # as many from each routing group
    kept.write_text(json.dumps({str(layer): half for layer in anatomy.moe_layers}))
    folder /= "pruned"
    prune(str(source), PruneSpec(keep_experts=kept), Writing(output=folder))
    return Victim(folder, source, kept, len(half))


def _holds(victim: Victim) -> None:
    """Everything that reads the spoiled checkpoint: done, or refused as an error of the user's."""
    name, source = str(victim.folder), str(victim.source)
    with writes_only_to():
        for work in (_looks, _plans, inspect, verify, lambda name: verify(name, source), lambda n: verify(source, n)):
            try:
                report = work(name)
            except MoeSurgeonError as error:
                assert 2 <= error.exit_code <= 5
                str(error).encode()
            else:
                json.dumps(report, allow_nan=False)


def _looks(name: str) -> list[str]:
    problems = problems_of(open_subject(name, complete=False).anatomy)
    assert all(isinstance(problem, str) for problem in problems)
    return problems


def _plans(name: str) -> list[dict[str, Any]]:
    """Plan on a checkpoint that is whole, as the commands do."""
    subject = open_subject(name)
    kept = {layer: [0] for layer in subject.anatomy.moe_layers}
    plans = [plan_retop(subject.anatomy, RetopSpec(top_k=1))]
    for layout in LAYOUTS:
        with suppress(UsageError):  # another family's
            plans.append(plan_layout(subject.anatomy, layout))
    if subject.anatomy.experts > 1 and subject.anatomy.top_k == 1:
        plans.append(plan_prune(subject.anatomy, kept))
    for plan in plans:
        plan.check(subject.checkpoint.tensors)
        plan.result(subject.anatomy)
    return [plan.summary() for plan in plans]


def _writes(victim: Victim) -> None:
    """Cut one more expert: a checkpoint that opens again is in the target, or nothing is."""
    parent = victim.folder.parent / "written"
    parent.mkdir(exist_ok=True)
    target = parent / "out"
    kept = victim.folder.parent / "fewer.json"
    fewer = list(range(max(1, victim.experts - 1)))
    kept.write_text(json.dumps({layer: fewer for layer in json.loads(victim.kept.read_text())}))
    with writes_only_to(parent):
        try:
            prune(str(victim.folder), PruneSpec(keep_experts=kept), Writing(output=target))
        except MoeSurgeonError:
            assert not list(parent.iterdir())
        else:
            open_subject(str(target))
    shutil.rmtree(parent)


def _spoil(victim: Victim, path: Path, raw: bytes, *, write: bool = False) -> None:
    """Put ``raw`` in the place of a file while the checkpoint is looked at."""
    valid = path.read_bytes()
    path.write_bytes(raw)
    try:
        _holds(victim)
        if write:
            _writes(victim)
    finally:
        path.write_bytes(valid)


@pytest.mark.parametrize("kind", KINDS)
@given(mutations=MUTATIONS)
@FUZZ
def test_config(victims: dict[str, Victim], kind: str, mutations: Any) -> None:
    path = victims[kind].folder / CONFIG_NAME
    config = mutated(json.loads(path.read_bytes()), mutations)
    _spoil(victims[kind], path, written(config), write=kind == "per-expert")


@pytest.mark.parametrize("kind", ["per-expert", "deepseek_v3"])
@given(mutations=MUTATIONS)
@FUZZ
def test_index(victims: dict[str, Victim], kind: str, mutations: Any) -> None:
    path = victims[kind].folder / INDEX_NAME
    if path.exists():
        _spoil(victims[kind], path, written(mutated(json.loads(path.read_bytes()), mutations)), write=True)


@pytest.mark.parametrize("kind", ["per-expert", "fused", "fp8"])
@given(mutations=MUTATIONS)
@FUZZ
def test_header(victims: dict[str, Victim], kind: str, mutations: Any) -> None:
    victim = victims[kind]
    header, data = header_of(victim.shard.read_bytes())
    _spoil(victim, victim.shard, with_header(mutated(header, mutations), data))


@pytest.mark.parametrize("kind", ["per-expert", "qwen2_moe"])
@given(names=st.lists(st.tuples(st.integers(0, 2**20), st.text(max_size=20)), min_size=1, max_size=3))
@FUZZ
def test_names_in_index_and_header(victims: dict[str, Victim], kind: str, names: list[tuple[int, str]]) -> None:
    """Tensors with any name at all, consistently: read, and written again as they are."""
    victim = victims[kind]
    header, data = header_of(victim.shard.read_bytes())
    known = [name for name in header if name != "__metadata__"]
    new = {known[where % len(known)]: name for where, name in names}
    path = victim.folder / INDEX_NAME
    valid = path.read_bytes()
    index = json.loads(valid)
    index["weight_map"] = {new.get(name, name): shard for name, shard in index["weight_map"].items()}
    path.write_bytes(written(index))
    try:
        renamed = with_header({new.get(name, name): entry for name, entry in header.items()}, data)
        _spoil(victim, victim.shard, renamed, write=True)
    finally:
        path.write_bytes(valid)


@pytest.mark.parametrize("kind", ["per-expert", "deepseek_v3"])
@given(mutations=MUTATIONS)
@FUZZ
def test_provenance(victims: dict[str, Victim], kind: str, mutations: Any) -> None:
    path = victims[kind].folder / PROVENANCE_NAME
    provenance = mutated(json.loads(path.read_bytes()), mutations)
    _spoil(victims[kind], path, written(provenance), write=kind == "per-expert")


@pytest.mark.parametrize("name", [CONFIG_NAME, INDEX_NAME, PROVENANCE_NAME, "model-00001-of-00002.safetensors"])
@given(changes=BYTES)
@FUZZ
def test_bytes(victims: dict[str, Victim], name: str, changes: Sequence[tuple[int, str, int]]) -> None:
    victim = victims["per-expert"]
    path = victim.folder / name if name.endswith(".json") else victim.shard
    raw = path.read_bytes()
    _spoil(victim, path, spoiled(raw, changes, None if name.endswith(".json") else len(raw) // 4))
