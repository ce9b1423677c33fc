"""One source for all faults, and what a clean run makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesurgeon.checkpoint import parallel
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import plan_prune
from tests.faults.synthetic import hashes, synthetic


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(str(synthetic(tmp_path_factory.mktemp("synthetic") / "source")))


@pytest.fixture(scope="session")
def plan(source: Subject) -> EditPlan:
    """Six of eight experts in every layer."""
    return plan_prune(source.anatomy, dict.fromkeys(source.anatomy.routed_layers, (0, 1, 3, 4, 6, 7)))


@pytest.fixture(scope="session")
def clean(source: Subject, plan: EditPlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of what an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("clean") / "out"
    apply(plan, source.checkpoint, folder)
    return hashes(folder)


@pytest.fixture(autouse=True)
def _the_source_stays(source: Subject) -> object:
    """No fault may touch the source."""
    before = hashes(source.root)
    yield
    assert hashes(source.root) == before


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are written one after the other, so that a test can say which are finished."""
    monkeypatch.setattr(parallel, "AT_ONCE", 1)


@pytest.fixture
def old(tmp_path: Path) -> dict[str, str]:
    """A folder ``out`` that was there before; its hashes."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "mixtral"}')
    (out / "model.safetensors").write_bytes(b"old" * 100_000)
    return hashes(out)
