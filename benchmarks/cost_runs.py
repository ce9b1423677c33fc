"""The healing that ``heal_cost.py`` measures: time in turns with the stock forward pass, and the peak of memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cost_pieces import WAYS, Size
from benchmarks.cost_rates import timed
from benchmarks.cost_real import LENGTH
from moesurgeon.healing.pace import Pace


def size_of(job: dict[str, Any]) -> Size:
    """Return the synthetic layer after a quarter of its experts was cut."""
    kept, high = job["experts"] * 3 // 4, job["hidden"]
    attention = 2 * high * high * 2.5 + 4 * high * LENGTH  # its projections and, on average, its scores
    return Size(hidden=high, parts=((job["width"], 2 / kept),) * kept, other=int(attention))


def pace_of(job: dict[str, Any]) -> Pace:
    """Return the pace of the distillation that is measured: never judged before its end."""
    steps, tokens = job["steps"], 256 if job["quick"] else 2048
    return Pace(steps=steps, tokens_per_step=tokens, judge_every=steps, rank=job["rank"])


def opened(job: dict[str, Any]) -> Any:
    """Return the source, a plan that cuts a quarter of the experts, and the batches to heal on and to judge on."""
    import numpy as np
    import torch

    from moesurgeon.engine.batches import batches_of, rows_for
    from moesurgeon.engine.device import Placement
    from moesurgeon.engine.streams import Source
    from moesurgeon.pipeline.subject import open_subject
    from moesurgeon.surgery.prune import plan_prune
    from moesurgeon.traces.windows import Corpus, Window

    torch.set_num_threads(job["threads"])
    subject, device = open_subject(job["checkpoint"]), torch.device(job["device"])
    source = Source.of_checkpoint(subject.checkpoint, subject.anatomy, Placement(device, torch.float32))
    plan = plan_prune(subject.anatomy, {0: range(job["experts"] * 3 // 4)})
    rng, batches = np.random.default_rng(0), []
    for tokens in (job["tokens"], job["tokens"] // 8):
        rows = rng.integers(256, size=(tokens // LENGTH or 1, LENGTH)).astype(np.int32)
        windows = [Window("random", number, 0, row) for number, row in enumerate(rows)]
        corpus = Corpus(windows=windows, tokens={"random": rows.size})
        batches.append(list(batches_of(corpus, rows=rows_for(LENGTH), device=device)))
    return source, plan, *batches


def healing(job: dict[str, Any], opened: Any, way: str) -> Callable[[], object]:
    from moesurgeon.engine.streams import Overlay, Stream
    from moesurgeon.engine.walk import Walk
    from moesurgeon.healing.heal import heal

    (source, plan, train, heldout), (method, low) = opened, WAYS[way]
    pace = pace_of(job) if low else replace(pace_of(job), rank=None)

    def work() -> None:
        teacher, student = Stream(source), Stream(source, Overlay(plan=plan))
        walk = Walk([teacher, student], [*train, *heldout])
        numbers = range(len(train)), range(len(train), len(walk.batches))
        heal(walk, student, teacher, *numbers, method=method, pace=pace)

    return work


def work_speed(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from moesurgeon.engine.whole import filled

    given = opened(job)
    _source, _plan, train, heldout = given
    stock_model: Any = filled(opened(job)[0]).base_model

    @torch.no_grad()
    def stock() -> None:
        for batch in train:
            stock_model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)

    sides: dict[str, Callable[[], object]] = {"stock": stock, **{way: healing(job, given, way) for way in WAYS}}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    stock()
    for number in range(job["runs"]):
        for name, side in list(sides.items())[:: 1 if number % 2 else -1]:
            seconds[name].append(timed(side, job))
    tokens, judged = (sum(batch.text_tokens for batch in each) for each in (train, heldout))
    return {"seconds": seconds, "tokens": tokens, "heldout": judged}


def work_peak(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from moesurgeon.engine.streams import Overlay, Stream
    from moesurgeon.engine.walk import Walk
    from moesurgeon.healing.memory import healing_bytes

    given = opened(job)
    source, plan, train, heldout = given
    walk = Walk([Stream(source)], train[:1])
    walk.through()  # the weights are there, and so are the libraries
    del walk
    pace = replace(pace_of(job), steps=2, judge_every=2, rank=pace_of(job).rank if WAYS[job["way"]][1] else None)
    batches = [*train, *heldout]
    account = healing_bytes(Stream(source, Overlay(plan=plan)), WAYS[job["way"]][0], pace, batches)
    hidden = 2 * sum(batch.tokens.numel() for batch in batches) * source.anatomy.hidden * 4
    cuda = job["device"].startswith("cuda")
    before = torch.cuda.memory_allocated() if cuda else status("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    healing({**job, "steps": 2}, given, job["way"])()
    peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
    return {"over_bytes": peak - before, "account_bytes": account.copy + account.work + account.held + hidden}


def status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(lines[name].split()[0]) * 1024
