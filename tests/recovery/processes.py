"""What one of several processes makes of the steps of a training, in float64; a program as ``tests.engine.processes``.

``python -m tests.recovery.processes MODEL FOLDER`` saves the gradients and figures of ``CASES`` to FOLDER under
the number of the process.
"""

from __future__ import annotations

import itertools
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from moesurgeon.engine.batches import to_batch
from moesurgeon.engine.device import Placement
from moesurgeon.engine.ranks import Ranks, join_ranks
from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.engine.whole import filled
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.resident import Resident
from moesurgeon.recovery.result import Training
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.streamed import Streamed, Streaming
from moesurgeon.surgery.plan import identity
from moesurgeon.traces.windows import Window
from tests.engine.small import VOCABULARY, corpus_of, random_windows, saved, small_model, source_of

ALL = Losses(lm=0.3, router=0.5, hidden=0.7, balance=0.2, z=0.1)
CASES: dict[str, dict[str, Any]] = {
    "everything": {"adapt": ("routers", "experts"), "losses": ALL},
    "adalora": {"adapter": "adalora", "losses": ALL},
    "full routers, language model": {"adapt": ("full-routers",), "losses": Losses(objective="lm", balance=1.0)},
}
FLOAT64 = Placement(torch.device("cpu"), torch.float64)


def batches() -> list[list[Window]]:
    """Return the windows of each batch: five of many lengths, two, one (for one process), one token in a row."""
    windows = random_windows("a", count=8, vocabulary=VOCABULARY)
    short = Window("a", 9, 0, np.array([3], dtype=np.int32))
    return [windows[:5], windows[5:7], windows[7:], [short, windows[0]], [windows[0], short]]


def model(folder: Path) -> Subject:
    """Write the model of all cases; raw weights, so that the language-model loss reaches a single expert's router."""
    changes = {"first_k_dense_replace": 0, "num_hidden_layers": 2, "num_experts_per_tok": 1}
    return saved(small_model("deepseek_v1", **changes), folder)


def results(ranks: Ranks, subject: Subject) -> dict[str, np.ndarray]:
    """Return the gradients, figures and norms of all ``CASES`` and ``batches``, and judgements."""
    found: dict[str, np.ndarray] = {}
    teacher = replace(subject.anatomy, top_k=3, top_ks=(3,) * len(subject.anatomy.top_ks))
    heldout = corpus_of(random_windows("a", count=5, vocabulary=VOCABULARY, seed=3))
    for (name, case), kind in itertools.product(CASES.items(), (Resident, Streamed)):
        training = Training(**case, schedule=Schedule(steps=20, rank=2), length=40)
        source, key = source_of(subject, FLOAT64), f"{kind.__name__} {name}"
        with ExitStack() as stack:
            student = Stream(source, Overlay(plan=identity(subject.anatomy)))
            held: Any = filled(source) if kind is Resident else Streaming(subject.root / "none", piece=64)
            steps: Any = kind(stack, student, held, heldout, training, ranks)
            judged = steps.judged()
            found |= {f"{key} sums": judged.sums, f"{key} counts": judged.counts}
            torch.manual_seed(0)
            adapted = steps.begin(teacher, None)
            for weight in adapted.weights():  # away from the start, where most gradients are zero
                weight.data = weight.data.double() + 0.1 * torch.randn_like(weight)
            accelerator = Accelerator(cpu=True)
            optimizer = torch.optim.SGD(adapted.weights(), 0.0)
            steps.prepare(accelerator, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
            for number, windows in enumerate(batches()):
                given = steps.gradients(to_batch(windows, FLOAT64.device), "routers")
                gradients = torch.cat([weight.grad.flatten() for weight in adapted.weights()])
                found[f"{key} {number} gradients"] = gradients.numpy()
                found[f"{key} {number} figures"] = np.array([*given.figures.values(), given.norm])
                optimizer.zero_grad()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = join_ranks("cpu")
    np.savez(Path(sys.argv[2]) / f"{joined.number}.npz", **results(joined, open_subject(sys.argv[1])))
