"""Several processes of one run, as a launcher starts them; and what one of them does when this is its program.

``python -m tests.engine.processes FOLDER`` profiles and measures in all the ways of ``CASES`` and saves what
came of it to FOLDER under the number of the process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesurgeon.engine.ranks import Ranks, join_ranks
from moesurgeon.engine.state import WalkState
from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.evaluation.measure import measure
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.engine.small import batches_for, corpus_of, random_windows, source_of

# Windows of two domains, and how many go into a batch.
CASES = {"many": ((13, 8), 2), "as many as processes": ((2, 1), 1), "fewer": ((1, 1), 1), "one": ((3, 0), 3)}


def results(ranks: Ranks, folder: Path) -> dict[str, np.ndarray]:
    """Return every number of the profiles and measurements of ``CASES``."""
    found: dict[str, np.ndarray] = {}
    subject = open_subject("builtin:tiny-mixtral")
    for name, (counts, rows) in CASES.items():
        domains = [random_windows(d, count=n, vocabulary=2048) for d, n in zip("ab", counts, strict=True) if n]
        corpus = corpus_of(*domains)
        batches = batches_for(corpus, 40, rows)
        source = source_of(subject)
        for kind in ("memory", "file"):
            place = None
            if kind == "file":
                source.supply.allow(source.supply.least)
                place = folder / f"{name}-{ranks.number}"
                place.mkdir()
            state = WalkState(folder / f"{name}.walk", "digest", ranks) if place else None
            taken = take_profile(Stream(source), corpus.domains, batches, ranks=ranks, folder=place, state=state)
            found |= {f"{name} {kind} {key}": sums for key, sums in taken.sums.items()}
            found[f"{name} {kind} seen"] = taken.seen
            top_1 = Stream(source, Overlay(plan=plan_retop(subject.anatomy, RetopSpec(top_k=1))))
            measured = measure(top_1, corpus.domains, batches, teacher=Stream(source), ranks=ranks, folder=place)
            for field in ("domain", "document", "buckets"):
                found[f"{name} {kind} measured {field}"] = getattr(measured, field)
            assert measured.tokens == sum(corpus.tokens.values())
            assert measured.tokens_per_second > 0
    return found


def launch(count: int, *command: str | Path, **options: Any) -> list[subprocess.Popen[bytes]]:
    """Start ``command`` (what follows the interpreter) ``count`` times, as processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(count),
                   "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        for number in range(count)
    ]


def ends(processes: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, str, str]]:
    """Wait for all; return their exit codes and what they said on stdout and stderr."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            found.append((process.returncode, out.decode(), err.decode()))
    finally:
        for process in processes:
            process.kill()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    joined = join_ranks("cpu")
    np.savez(home / f"{joined.number}.npz", **results(joined, home))
