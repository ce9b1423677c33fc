"""The FLOPs by which healing is projected, next to those that torch counts while it heals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.cost_pieces import WAYS, pieces  # noqa: E402
from benchmarks.cost_runs import healing, opened, pace_of, size_of  # noqa: E402
from benchmarks.synthetic import Geometry, make_checkpoint  # noqa: E402


def added(_total: Any, one: Any, other: Any, **_rest: Any) -> int:
    """Return FLOPs of a product that is added in place, which torch does not count, from shapes."""
    return 2 * int(one[0]) * int(one[1]) * int(other[1])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("cost") / "checkpoint"
    make_checkpoint(folder, 1, geometry=Geometry(hidden=64, width=192, experts=4, vocabulary=256))
    sizes = {"hidden": 64, "width": 192, "experts": 4, "tokens": 2048}
    return {**sizes, "checkpoint": str(folder), "threads": 1, "device": "cpu", "quick": True, "steps": 3, "rank": 24}


@pytest.mark.parametrize("way", WAYS)
def test_pieces_are_the_products_that_are_computed(job: dict[str, Any], way: str) -> None:
    given = opened(job)
    heal = healing(job, given, way)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        heal()
    made = pieces(size_of(job), way, job["tokens"], job["tokens"] // 8, pace_of(job))
    assert made["forward"] + made["sums"] + made["train"] == pytest.approx(counter.get_total_flops(), rel=0.03)
