"""What healing gives back of what a cut costs, on both builtin checkpoints and on text that nothing was tuned on.

    python benchmarks/healing.py [--checkpoint tiny-mixtral] [--seeds 2] [--steps 600]
                                 [--learning-rate 1e-3] [--json FILE]

Each operation is written bare and healed, and each result is held against the original on the report split:
perplexity rise with a 95 % interval (bootstrap over documents, paired), share of the loss gap closed, seconds
and CPU seconds of the whole operation. Experts are chosen by REAP from a profile of the calibration split, the
text that heals as well; the validation split judges each step.

Prints a table, the bars and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as `python benchmarks/healing.py`

from moesurgeon.healing.pace import Method, Pace
from moesurgeon.pipeline.evaluate import evaluate
from moesurgeon.pipeline.options import HealSpec, Running, Text, Writing
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.retop import retop
from moesurgeon.surgery.retop import RetopSpec


@dataclass(frozen=True)
class Operation:
    """``keep`` experts, or ``top_k`` of them per token. ``bars``: what distillation has to reach."""

    checkpoint: str
    name: str
    keep: int | None = None
    top_k: int | None = None
    rise_bar: float | None = None
    closed_bar: float | None = None


OPERATIONS = (
    Operation("tiny-mixtral", "top-2 -> top-1", top_k=1, closed_bar=0.65),
    Operation("tiny-mixtral", "8 -> 6 experts", keep=6, rise_bar=0.1),
    Operation("tiny-deepseek", "16 -> 12 experts", keep=12, rise_bar=0.5),
    Operation("tiny-deepseek", "top-4 -> top-2", top_k=2),
)
RUNNING = Running(device="cpu", dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", choices=["tiny-mixtral", "tiny-deepseek"], help="only this one")
    parser.add_argument("--seeds", type=int, default=2, help="of the distillation")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=Pace().learning_rate)
    parser.add_argument("--tokens", type=int, default=98304, help="to heal on")
    parser.add_argument("--report-tokens", type=int, default=49152)
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for operation in OPERATIONS:
            if given.checkpoint in (None, operation.checkpoint):
                for row in measured(operation, given, Path(folder)):
                    rows.append(row)
                    show(row)
    for row in bars(rows):
        print(row["text"])
    result = {"options": {**vars(given), "json": None}, "rows": rows, "bars": bars(rows)}
    print(json.dumps(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(operation: Operation, given: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each method and seed; the first one is bare."""
    source = f"builtin:{operation.checkpoint}"
    taken = folder / operation.checkpoint
    if not taken.exists():
        profile(source, ProfileOutput(output=taken), Text(max_tokens=49152), RUNNING)
    ways: list[tuple[Method | None, int]] = [(None, 0), ("scale", 0), ("ridge", 0)]
    ways += [("distill", seed) for seed in range(given.seeds)]
    rows: list[dict[str, Any]] = []
    for number, (method, seed) in enumerate(ways):
        heal = None
        if method is not None:
            pace = Pace(steps=given.steps, seed=seed, learning_rate=given.learning_rate)
            heal = HealSpec(traces=("builtin:all",), method=method, max_tokens=given.tokens, pace=pace)
        writing = Writing(output=folder / f"{operation.checkpoint} {operation.name} {number}")
        started, used = time.monotonic(), time.process_time()
        if operation.top_k is not None:
            retop(source, RetopSpec(top_k=operation.top_k), writing, heal=heal, running=RUNNING)
        else:
            prune(source, PruneSpec(profile=taken, keep=operation.keep, heal=heal), writing, running=RUNNING)
        seconds, cpu = time.monotonic() - started, time.process_time() - used
        against = evaluate(str(writing.output), source, Text(max_tokens=given.report_tokens), RUNNING)["against"]
        rows.append(
            {
                "checkpoint": operation.checkpoint,
                "operation": operation.name,
                "method": method or "bare",
                "seed": seed,
                "rise": against["perplexity_ratio"] - 1,
                "interval": [bound - 1 for bound in against["interval"]],
                "closed": closed(against["perplexity_ratio"], rows[0]["rise"] + 1) if rows else 0.0,
                "seconds": seconds,
                "cpu_seconds": cpu,
            }
        )
        yield rows[-1]


def closed(ratio: float, bare: float) -> float:
    """Return the share of the loss gap that was closed, from ratios of perplexity to the original.

    >>> round(closed(1.1, 1.21), 3)
    0.5
    """
    return 1 - math.log(ratio) / math.log(bare)


def show(row: dict[str, Any]) -> None:
    low, high = row["interval"]
    seed = f" {row['seed']}" if row["method"] == "distill" else ""
    print(
        f"{row['checkpoint']:<14} {row['operation']:<17} {row['method'] + seed:<10} rise {row['rise']:7.1%} "
        f"({low:.1%} to {high:.1%})  closed {row['closed']:5.0%}  {row['seconds']:5.0f} s, "
        f"CPU {row['cpu_seconds']:.0f} s",
        flush=True,
    )


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was to be reached, by the worst seed, and whether it was."""
    results = []
    for operation in OPERATIONS:
        mine = [row for row in rows if (row["checkpoint"], row["operation"]) == (operation.checkpoint, operation.name)]
        healed = [row for row in mine if row["method"] == "distill"]
        if not healed:
            continue
        share = max(row["rise"] for row in healed) / mine[0]["rise"]
        least = min(row["closed"] for row in healed)
        for what, value, bar, met in (
            ("rise at most {:.2f} x bare", share, operation.rise_bar, share <= (operation.rise_bar or 0)),
            ("loss gap closed at least {:.2f}", least, operation.closed_bar, least >= (operation.closed_bar or 0)),
        ):
            if bar is not None:
                name = f"{operation.checkpoint}, {operation.name}: {what.format(bar)}"
                verdict = "met" if met else "MISSED"
                results.append({"name": name, "value": value, "met": met, "text": f"{name}: {value:.2f}, {verdict}"})
    return results


if __name__ == "__main__":
    main()
