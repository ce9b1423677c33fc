"""llm-compressor's REAP on given windows of text, for benchmarks that have it beside ours.

It needs transformers and torch of its own choice: install it in an environment of its own, with moesurgeon.
Version 0.14.0.1 with transformers 5.23 loses the causal mask: its counts in the first layer are exactly those of full
attention, ours those of the stock model. So scores differ a little there, and more below, where it sees its own cuts.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgeon.traces.windows import Window

MISSING = "llmcompressor is not installed (pip install llmcompressor in an environment of its own)"


@dataclass(frozen=True)
class Theirs:
    """``kept`` by layer, ``saliencies`` [L][E] and the ``seconds`` of each run."""

    kept: dict[int, tuple[int, ...]]
    saliencies: list[Any]
    seconds: list[float]


def is_installed() -> bool:
    return importlib.util.find_spec("llmcompressor") is not None


def reap_of_llmcompressor(
    root: Path | str,
    windows: Sequence[Window],
    *,
    length: int,
    batch: int,
    experts: int,
    keep: int,
    runs: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Theirs:
    """Run their one-shot REAP on ``windows``, all of ``length`` tokens and a whole number of batches of them."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import REAPPruningModifier
    from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker
    from transformers import AutoModelForCausalLM

    saliencies: list[Any] = []
    compute = REAPSaliencyTracker.compute_retained_experts

    def noted(self: Any, *arguments: Any) -> Any:
        saliencies.append((self.sum_saliency / self.count.clamp(min=1)).cpu().numpy())
        return compute(self, *arguments)

    text = Dataset.from_list(
        [{"input_ids": window.tokens.tolist(), "attention_mask": [1] * length} for window in windows]
    )
    seconds = []
    REAPSaliencyTracker.compute_retained_experts = noted
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "kept.json"
            for _ in range(runs):
                saliencies.clear()
                model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, local_files_only=True)
                recipe = REAPPruningModifier(sparsity=1 - keep / experts, report_path=str(report))
                started = clock()
                oneshot(
                    model,
                    dataset=text,
                    recipe=recipe,
                    num_calibration_samples=len(windows),
                    max_seq_length=length,
                    batch_size=batch,
                    moe_calibrate_all_experts=False,
                )
                seconds.append(clock() - started)
            found = json.loads(report.read_text())
    finally:
        REAPSaliencyTracker.compute_retained_experts = compute
    kept = {int(name.split(".")[2]): tuple(sorted(experts)) for name, experts in found.items()}
    return Theirs(kept, list(saliencies), seconds)
