"""What training with streamed layers takes beside training with all weights in memory: memory, seconds, bytes read.

    python benchmarks/recover_memory.py [--bytes 300MB] [--tokens 512] [--steps 3] [--runs 1] [--adapt full-routers]

A synthetic Mixtral and random text: nothing is learnt, everything is computed. The student, with one expert per token,
is its own teacher with two; two candidates get a gradient. Each side trains in a process of its own, in turns; the
first step of a streamed training has a pass more and is left out of the seconds, which are the processor's: where
others work beside it the clock says little. Peaks are above what the process had with torch loaded. The checkpoint is
in the page cache: waiting for a disk is not part of it. About a minute on one core.
Prints a table and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as `python benchmarks/recover_memory.py`

from benchmarks.synthetic import bytes_from, geometry_for, make_checkpoint  # noqa: E402 - after its path
from benchmarks.workers import worker  # noqa: E402

SIDES = ("resident", "streamed")
ADAPT = ("routers", "full-routers", "experts", "experts-all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=bytes_from, default="300MB")
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--adapt", choices=ADAPT, nargs="+", default=["full-routers"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(work(json.loads(sys.stdin.read()))))
        return
    job = {name: getattr(given, name) for name in ("tokens", "length", "steps", "threads", "adapt")}
    with tempfile.TemporaryDirectory(prefix="moesurgeon-recover-") as scratch:
        folder = make_checkpoint(Path(scratch) / "mixtral", given.bytes, geometry=geometry_for(given.bytes))
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(given.runs):
            for side in SIDES:
                found[side].append(
                    worker(__file__, side, {**job, "checkpoint": str(folder), "side": side, "scratch": scratch})
                )
    first = found["streamed"][0]
    print(
        f"{first['bytes'] / 1e6:,.0f} MB in bfloat16, {first['layers']} layers, computed in float32; {given.tokens} "
        f"tokens a step, {' and '.join(given.adapt)}, {given.threads} thread(s)"
    )
    medians = {
        side: {name: statistics.median(each[name] for each in runs) for name in ("peak_bytes", "seconds", "loss")}
        for side, runs in found.items()
    }
    for side, figures in medians.items():
        print(f"{side:9} peak {figures['peak_bytes'] / 1e6:8,.0f} MB   {figures['seconds']:6.2f} s/step")
    ratios = {name: medians["streamed"][name] / medians["resident"][name] for name in ("peak_bytes", "seconds")}
    print(
        f"streamed / resident: {ratios['peak_bytes']:.2f} x the memory, {ratios['seconds']:.2f} x the time, "
        f"{first['bytes_per_step'] / 1e6:,.0f} MB read a step; losses of the last step "
        f"{medians['resident']['loss']:.6f} and {medians['streamed']['loss']:.6f}"
    )
    print(json.dumps({"options": job, "runs": found, "ratios": ratios}))


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train on one side and say what it took."""
    import itertools
    from contextlib import ExitStack
    from dataclasses import replace

    import numpy as np
    import torch
    from accelerate import Accelerator

    from moesurgeon.engine.device import Placement
    from moesurgeon.engine.streams import Overlay, Source, Stream
    from moesurgeon.engine.whole import filled
    from moesurgeon.pipeline.subject import open_subject
    from moesurgeon.recovery.objective import Losses
    from moesurgeon.recovery.resident import Resident
    from moesurgeon.recovery.result import Training
    from moesurgeon.recovery.schedule import Schedule, endless
    from moesurgeon.recovery.streamed import Streamed, Streaming, bytes_per_step
    from moesurgeon.recovery.targets import parts_of
    from moesurgeon.surgery.plan import identity
    from moesurgeon.traces.windows import Corpus, Window

    torch.set_num_threads(job["threads"])
    subject = open_subject(job["checkpoint"])
    teacher = subject.anatomy
    anatomy = replace(teacher, top_k=1, top_ks=(1,) * len(teacher.top_ks))
    tokens = np.random.default_rng(0).integers(
        0, teacher.config["vocab_size"], (2 * job["tokens"] // job["length"], job["length"])
    )
    windows = [Window("random", number, 0, row.astype(np.int32)) for number, row in enumerate(tokens)]
    corpus = Corpus(windows=windows, tokens={"random": tokens.size})
    training = Training(
        adapt=tuple(job["adapt"]),
        losses=Losses(lm=0.1),
        schedule=Schedule(tokens_per_step=job["tokens"], candidates=2),
        length=job["length"],
    )
    placement = Placement(torch.device("cpu"), torch.float32)
    before = _status("VmRSS")
    with Source.of_checkpoint(subject.checkpoint, anatomy, placement, "grouped_mm") as source, ExitStack() as stack:
        student = Stream(source, Overlay(plan=identity(anatomy)))
        if job["side"] == "resident":
            steps: Any = Resident(stack, student, filled(source), corpus, training)
        else:
            source.supply.allow(source.supply.least)
            steps = Streamed(stack, student, Streaming(Path(job["scratch"]) / "weights"), corpus, training)
        adapted = steps.begin(teacher, None)
        optimizer: Any = torch.optim.AdamW(adapted.weights(), lr=1e-4)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
        accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        optimizer, rate = steps.prepare(accelerator, optimizer, rate)
        seconds, loss = [], 0.0
        rows = job["tokens"] // job["length"]
        for number, batch in enumerate(itertools.islice(endless(corpus, rows, 0, placement.device), job["steps"])):
            started = time.process_time()
            loss = steps.gradients(batch, parts_of(training.adapt)[0] if number == 0 else None).figures["loss"]
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - started)
        return {
            "seconds": statistics.median(seconds[1:] or seconds),
            "peak_bytes": _status("VmHWM") - before,
            "loss": loss,
            "layers": anatomy.layers,
            "bytes": subject.checkpoint.nbytes,
            "bytes_per_step": bytes_per_step(source),
        }


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


if __name__ == "__main__":
    main()
