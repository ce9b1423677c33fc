"""A checkpoint with fewer experts, and ways to tamper with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesurgeon.pipeline.subject import Subject
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, compose
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop

KEPT = {1: (0, 2, 5, 6), 2: (1, 2, 4, 7), 3: (0, 3, 4, 5)}


def edited(source: Subject, layout: str) -> EditPlan:
    plan = plan_retop(source.anatomy, RetopSpec(top_k=1))
    plan = compose(plan, plan_prune(plan.result(source.anatomy), KEPT))
    return compose(plan, plan_layout(plan.result(source.anatomy), layout))


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def forge(folder: Path, change: Callable[[Any], Any]) -> None:
    record = json.loads((folder / "moesurgeon.json").read_text())
    (folder / "moesurgeon.json").write_text(json.dumps(change(record)))
