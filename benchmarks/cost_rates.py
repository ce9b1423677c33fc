"""What a machine does of each kind of ``cost_pieces`` in a second, on matrices of an expert; and which it is."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cost_pieces import solve_flops

LARGEST_SOLVE = 4096
"""Rows of the matrix that is factorised at most: all 14336 of Mixtral's would take a minute or two on a core."""
ENOUGH = 8.0
"""Seconds after which no further run is timed."""


def work_rates(job: dict[str, Any]) -> dict[str, float]:
    """Return by kind what is done in a second, the median of up to three runs.

    Of an expert [F, H] (``width``, ``hidden``): passes and sums on as many tokens as a refit takes at once (at most
    ``expert_tokens``), training on ``step_tokens``. One of Mixtral-8x7B's takes 3.5 GB of memory.
    """
    import torch
    import torch.nn.functional as F

    from moesurgeon.healing.ridge import chunk_tokens

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device, high, wide = torch.device(job["device"]), job["hidden"], job["width"]
    tokens = min(chunk_tokens(high, wide), job["expert_tokens"])
    found = {"sums": _sums(tokens, wide, job), "solve": _solutions(min(wide, LARGEST_SOLVE), high, job)}
    masters = [
        (torch.randn(*shape, device=device) / shape[1] ** 0.5).requires_grad_()
        for shape in ((2 * wide, high), (high, wide))
    ]
    inputs, batch = (torch.randn(count, high, device=device) for count in (tokens, job["step_tokens"]))

    def block(inputs: torch.Tensor) -> torch.Tensor:
        gate, rest = F.linear(inputs, masters[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * rest, masters[1])

    def train() -> None:
        for each in masters:
            each.grad = None
        block(batch).square().mean().backward()

    with torch.no_grad():
        found["forward"] = 6 * tokens * high * wide / typical(lambda: block(inputs), job)
    found["train"] = 18 * len(batch) * high * wide / typical(train, job)
    found["adam"] = 3 * high * wide / typical(torch.optim.Adam(masters, fused=True).step, job)
    return found


def _sums(tokens: int, wide: int, job: dict[str, Any]) -> float:
    """Return FLOPs in a second of adding up what ``tokens`` of width ``wide`` make of a Gram matrix."""
    import torch

    from moesurgeon.healing.exact import add_product, exact_device, factor

    fed = torch.randn(tokens, wide, device=job["device"])
    gram = torch.zeros(wide, wide, dtype=torch.float64, device=exact_device(fed.device))
    return 2 * tokens * wide * wide / typical(lambda: add_product(gram, factor(fed).T, factor(fed)), job)


def _solutions(rank: int, high: int, job: dict[str, Any]) -> float:
    """Return FLOPs in a second of a ridge solution in ``rank`` dimensions for ``high`` outputs."""
    import torch

    from moesurgeon.healing.exact import exact_device

    device = exact_device(torch.device(job["device"]))
    regular = torch.full((rank, rank), 1e-3, dtype=torch.float64, device=device)
    regular.diagonal().add_(1.0)
    wanted = torch.randn(rank, high, dtype=torch.float64, device=device)

    def solve() -> torch.Tensor:
        return torch.cholesky_solve(wanted, torch.linalg.cholesky_ex(regular)[0])

    return solve_flops(rank, high) / typical(solve, job)


def typical(work: Callable[[], object], job: dict[str, Any]) -> float:
    """Return the median of the seconds of up to three runs after one that does not count."""
    work()
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < ENOUGH:
        seconds.append(timed(work, job))
    return statistics.median(seconds)


def timed(work: Callable[[], object], job: dict[str, Any]) -> float:
    """Return the seconds of ``work``: of the processor where one thread computes, else of the clock."""
    import torch

    on_cpu = job["device"] == "cpu"
    clock = time.process_time if on_cpu and job["threads"] == 1 else time.perf_counter
    if not on_cpu:
        torch.accelerator.synchronize()
    started = clock()
    work()
    if not on_cpu:
        torch.accelerator.synchronize()
    return max(1e-9, clock() - started)


def work_machine(job: dict[str, Any]) -> dict[str, Any]:
    """Return what the machine is: its device, cores, and of them those that compute."""
    import torch

    processor = platform.processor() or platform.machine()
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        lines = dict(line.partition(":")[::2] for line in listed.read_text(encoding="utf-8").splitlines())
        processor = next((value.strip() for name, value in lines.items() if name.strip() == "model name"), processor)
    found = {
        "processor": f"{processor} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count(),
        "threads": job["threads"],
    }
    device = torch.device(job["device"])
    return found | {"accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else job["device"]}


def machine_name(machine: dict[str, Any]) -> str:
    """Return the machine in words.

    >>> machine_name({"processor": "AMD EPYC (AVX512)", "cores": 2, "threads": 1, "accelerator": "cpu"})
    '1 thread, 2 CPU cores, AMD EPYC (AVX512)'
    """
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    first = "" if machine["accelerator"] == "cpu" else f"{machine['accelerator']}; "
    return f"{first}{threads}, {machine['cores']} CPU cores, {machine['processor']}"
