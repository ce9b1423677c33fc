"""How long the commands that need no model take to start, next to a bare interpreter.

    python benchmarks/startup.py [--runs 9] [--checkpoint CKPT]

Prints the median wall-clock seconds of whole processes and their ratio to ``python -c pass``, taken in
turn so that a slow moment of the machine hits all of them, and a JSON object with the same figures.
Bars: ``--help`` 0.3 s, ``inspect`` 0.5 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--checkpoint", default="builtin:tiny-mixtral")
    arguments = parser.parse_args()
    tool = [sys.executable, "-m", "moesurgeon"]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.json"
        kept.write_text(json.dumps({str(layer): list(range(6)) for layer in range(4)}))
        out = str(Path(folder) / "out")
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "--help": [*tool, "--help"],
            "inspect": [*tool, "inspect", arguments.checkpoint],
            "retop --dry-run": [*tool, "retop", arguments.checkpoint, out, "--top-k", "1", "--dry-run"],
            "prune --dry-run": [*tool, "prune", "builtin:tiny-mixtral", out, "--keep-experts", str(kept), "--dry-run"],
            "verify": [*tool, "verify", arguments.checkpoint],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(arguments.runs + 1):
            for name, command in commands.items():
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                if run:  # the first round warms the caches
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bare = medians["python -c pass"]
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        print(f"{name:<18} {median:7.3f} s  ({spread})  {median / bare:5.1f} x a bare interpreter")
    print(json.dumps({"runs": arguments.runs, "median_seconds": medians}))


if __name__ == "__main__":
    main()
