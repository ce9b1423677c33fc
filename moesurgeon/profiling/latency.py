"""How long an expert takes for how many tokens, measured on the device and with the weights that are there.

All experts of a checkpoint have one shape, so one curve does for all of them. Beside it the experts of each layer
are timed as the stock implementation runs them, on some batches of the text, with the loads that those have.

Legend: C numbers of tokens, R repeats, L mixture layers, B batches of the sample, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation, Visitor
from moesurgeon.engine.ranks import Array, Ranks
from moesurgeon.profiling.curve import fitted
from moesurgeon.profiling.latency_facts import QUANTILES
from moesurgeon.surgery.anatomy import Anatomy

COUNTS = tuple(1 << power for power in range(13))
SECONDS = 3.0
_REPEATS, _LEAST = 200, 7  # of each number of tokens; the 99th percentile of fewer is their largest
_BATCHES = 5
_SHORT = 0.05  # seconds; what takes less is timed three times

Clocked = Callable[[Callable[[], object]], float]


class Latency:
    """Times experts while the ``batches`` of all processes go through; only the first process does.

    ``arrays``: seconds of one expert [C, R] (NaN: not run), seconds of all of a layer [L, B] and their loads [L, B, E].
    """

    def __init__(
        self, anatomy: Anatomy, batches: Sequence[Batch], ranks: Ranks | None = None, seconds: float = SECONDS
    ) -> None:
        ranks = ranks or Ranks()
        largest = max(batch.text_tokens for batch in batches)
        self._counts = [count for count in COUNTS if count <= largest]
        self._layers = anatomy.moe_layers
        self._seconds = seconds
        # Spread over the text: batches come by domain, the longest windows first.
        mine = range(0, len(batches), ranks.size)
        sample = sorted({mine[len(mine) * part // _BATCHES] for part in range(_BATCHES)})
        self._slots = {number: slot for slot, number in enumerate(sample)} if ranks.is_first else {}
        shape = len(self._layers), len(sample)
        self._samples = np.full((len(self._counts), _REPEATS), np.nan)
        self._of_blocks = np.full(shape, np.nan)
        self._loads = np.zeros((*shape, anatomy.experts))
        self._placement: tuple[str, str] = ("", "")

    @property
    def arrays(self) -> Mapping[str, Array]:
        return {
            "latency.samples": self._samples,
            "latency.of_blocks": self._of_blocks,
            "latency.loads": self._loads,
        }

    def visitor(self, number: int) -> Visitor | None:
        """Return who times the experts on batch ``number``, if it is in the sample."""
        slot = self._slots.get(number)
        return None if slot is None else partial(self._time, slot)

    def gather(self, layer: int, first: int, ranks: Ranks) -> None:
        """Leave the others out: one process measures."""

    def finish(self, layer: int) -> None:
        """Nothing is left to do."""

    def facts(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return what profile.json says; times in milliseconds.

        ``tokens``, ``p50``, ``p95``, ``p99``: one expert. ``knots``: of the curve through the medians. ``block``: by
        layer the median over batches of what all experts took, and of what the curve says of the same loads.
        """
        ran = [row for row, times in enumerate(self._samples) if np.isfinite(times).any()]
        times = 1e3 * self._samples[ran]
        tokens = [self._counts[row] for row in ran]
        quantiles = {name: np.nanquantile(times, share, axis=1).tolist() for name, share in QUANTILES.items()}
        curve = fitted(tokens, quantiles["p50"])
        blocks = {}
        for place, layer in enumerate(self._layers):
            there = np.isfinite(self._of_blocks[place])
            blocks[str(layer)] = {
                "measured_ms": float(1e3 * np.median(self._of_blocks[place, there])),
                "predicted_ms": float(np.median(curve(self._loads[place, there]).sum(axis=1))),
            }
        return {
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            **quantiles,
            "knots": curve.knots,
            "block": blocks,
        }

    def _time(self, slot: int, block: MoeBlock, seen: Observation) -> None:
        place = self._layers.index(block.layer)
        clocked = partial(_clocked, seen.inputs.device)
        if not np.isfinite(self._samples).any():
            run = partial(run_expert, block, seen.inputs)
            for row, seconds in enumerate(repeated(run, self._counts, self._seconds, clocked)):
                self._samples[row, : len(seconds)] = seconds
        # While it is observed, the instance's forward is ours. What it just did has warmed everything up.
        stock = partial(type(block.experts).forward, block.experts, seen.inputs, seen.indices, seen.weights)
        seconds = [clocked(stock)]
        while seconds[0] < _SHORT and len(seconds) < 3:
            seconds.append(clocked(stock))
        self._of_blocks[place, slot] = np.median(seconds)
        self._loads[place, slot] = np.bincount(seen.indices.flatten().cpu().numpy(), minlength=self._loads.shape[-1])


def run_expert(block: MoeBlock, inputs_TH: torch.Tensor, tokens: int, repeat: int) -> Callable[[], object]:
    """Return work for one expert with so many ``tokens``: gather, both products, weighting, adding up, as in the block.

    Every ``repeat`` takes the next expert, so that weights come from where they come from in a block.
    """
    parts: Any = block.experts
    expert = repeat % parts.down_proj.shape[0]
    token = torch.arange(tokens, device=inputs_TH.device) % len(inputs_TH)
    weight = torch.full((tokens, 1), 0.5, dtype=inputs_TH.dtype, device=inputs_TH.device)
    output = torch.zeros_like(inputs_TH)

    def work() -> object:
        gate, up = F.linear(inputs_TH[token], parts.gate_up_proj[expert]).chunk(2, dim=-1)
        made = F.linear(parts.act_fn(gate) * up, parts.down_proj[expert]) * weight
        return output.index_add_(0, token, made.to(output.dtype))

    return work


def repeated(
    run: Callable[[int, int], Callable[[], object]], counts: Sequence[int], seconds: float, clocked: Clocked
) -> list[list[float]]:
    """Return the seconds of ``run(count, repeat)`` for each of the ascending ``counts``, over about ``seconds`` in all.

    Counts take turns, so that a busy moment is not one count's alone. The first turn warms up and is thrown away;
    counts from the first one on that would not fit seven times into the time left have no times.
    """
    taken: list[list[float]] = [[] for _ in counts]
    first: list[float] = []
    for count in counts:
        first.append(clocked(run(count, 0)))
        if len(first) > 3 and _LEAST * sum(first) > seconds:
            first.pop()
            break
    spent, repeat = 0.0, 1
    while repeat <= _LEAST or (spent < seconds and repeat <= _REPEATS):
        for row in range(len(first)):
            taken[row].append(clocked(run(counts[row], repeat)))
            spent += taken[row][-1]
        repeat += 1
    return taken


def device_name(device: torch.device) -> str:
    """Return what tells that two measurements were taken on the same kind of device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _clocked(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes until the device is done with it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
