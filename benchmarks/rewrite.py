"""Removing 2 of 8 experts from every layer, next to copying the same bytes and to the usual ways of doing it.

    python benchmarks/rewrite.py [--bytes 4GB] [--runs 3] [--transformers-runs 1] [--folder /tmp] [--keep]

Every figure is that of a whole process; the ways take turns, on the same files, which are read once before
each run; what the run before left to write is flushed first. moesurgeon waits until its output is on the
disk (fsync) and cp does not, so cp is also measured with the fsync of what it wrote; "in fsync" is
moesurgeon's time in there. Memory is watched in a round of its own, because looking every few milliseconds
slows a copy down several times; in that round the results are compared, too.

Prints a table, the ratios against their bars and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as `python benchmarks/rewrite.py`

from benchmarks.synthetic import bytes_from, make_checkpoint
from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.checkpoint.reader import ShardReader

KEPT = 6
MIB = 1 << 20

# `python -m moesurgeon` with a clock around every call that waits for the disk.
TOOL = """
import os, sys, time
spent = 0.0
def timed(call):
    def clocked(*arguments):
        global spent
        started = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            spent += time.perf_counter() - started
    return clocked
for name in ("fsync", "fdatasync", "sync"):
    setattr(os, name, timed(getattr(os, name)))
from moesurgeon.cli import main
try:
    main()
finally:
    with open(os.environ["FSYNC_SECONDS"], "w") as file:
        file.write(str(spent))
"""

# What a careful user writes: shard by shard, so that one shard at a time is in memory.
SAFE_OPEN = """
import json, re, shutil, sys
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
source, target, kept = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
target.mkdir()
weight_map, total = {}, 0
for path in sorted(source.glob("*.safetensors")):
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            layer = re.match(r"model\\.layers\\.(\\d+)\\.", name)
            experts = kept[layer[1]] if layer else []
            expert = re.search(r"\\.experts\\.(\\d+)\\.", name)
            if expert:
                if int(expert[1]) in experts:
                    new = f".experts.{experts.index(int(expert[1]))}."
                    tensors[name.replace(expert[0], new)] = file.get_tensor(name)
            elif ".experts." in name or name.endswith(".gate.weight"):
                tensors[name] = file.get_slice(name)[:][experts].contiguous()
            else:
                tensors[name] = file.get_tensor(name)
    save_file(tensors, target / path.name, {"format": "pt"})
    weight_map |= dict.fromkeys(tensors, path.name)
    total += sum(tensor.nbytes for tensor in tensors.values())
index = {"metadata": {"total_size": total}, "weight_map": weight_map}
(target / "model.safetensors.index.json").write_text(json.dumps(index))
config = json.loads((source / "config.json").read_text())
(target / "config.json").write_text(json.dumps({**config, "num_local_experts": len(experts)}))
"""

TRANSFORMERS = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
source, target, kept = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
for number, layer in enumerate(model.model.layers):
    experts, chosen = layer.mlp.experts, kept[str(number)]
    for module, name in ((experts, "gate_up_proj"), (experts, "down_proj"), (layer.mlp.gate, "weight")):
        setattr(module, name, torch.nn.Parameter(getattr(module, name).data[chosen], requires_grad=False))
    experts.num_experts = len(chosen)
model.config.num_local_experts = len(chosen)
model.save_pretrained(target, max_shard_size="500MB")
"""


@dataclass
class Figures:
    """What was measured of one command, one entry per run; memory in bytes."""

    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)
    in_fsync: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return {
            "median_seconds": self.median,
            "seconds": self.seconds,
            "peak_resident_bytes": max(self.resident),
            "peak_anonymous_bytes": max(self.anonymous),
            **({"median_fsync_seconds": statistics.median(self.in_fsync)} if self.in_fsync else {}),
        }


@dataclass(frozen=True)
class Way:
    """One command, the folders that it reads and makes; ``runs``: None is as many as the others."""

    command: Sequence[str | Path]
    reads: Path | None = None
    writes: Path | None = None
    runs: int | None = None


def measure(way: Way, figures: Figures, scratch: Path, *, memory: bool) -> None:
    """Run ``way`` once as a process and add its time, or its ``memory``, to ``figures``."""
    if way.reads:
        warm(way.reads)
    os.sync()  # what an earlier run left to write is not this one's to wait for
    clock, errors = scratch / "fsync", scratch / "errors"
    clock.unlink(missing_ok=True)
    environment = {**os.environ, "FSYNC_SECONDS": str(clock), "HF_HUB_OFFLINE": "1"}
    with errors.open("w") as file:
        started = time.perf_counter()
        process = subprocess.Popen(way.command, env=environment, stdout=subprocess.DEVNULL, stderr=file)
        if memory:
            watch(process, figures)
        code = process.wait()
        seconds = time.perf_counter() - started
    if code:
        raise SystemExit(f"{list(map(str, way.command))[-5:]} failed:\n{errors.read_text()[-2000:]}")
    if not memory:
        figures.seconds.append(seconds)
        if clock.exists():
            figures.in_fsync.append(float(clock.read_text()))


def watch(process: subprocess.Popen[bytes], figures: Figures) -> None:
    resident = anonymous = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        if "VmHWM" in lines:  # the process's own highest; ru_maxrss would include ours before the exec
            resident = max(resident, int(lines["VmHWM"].split()[0]) * 1024)
            anonymous = max(anonymous, int(lines["RssAnon"].split()[0]) * 1024)
        time.sleep(0.002)
    figures.resident.append(resident)
    figures.anonymous.append(anonymous)


def take_turns(ways: dict[str, Way], runs: int, scratch: Path, check: Callable[[Path], None]) -> dict[str, Figures]:
    """Measure all ``ways``: the memory of each, then the time, beginning with another one in every round."""
    figures = {name: Figures() for name in ways}
    names = list(ways)
    for number in range(-1, runs):
        for name in names[max(number, 0) % len(names) :] + names[: max(number, 0) % len(names)]:
            way = ways[name]
            if way.runs is not None and number >= way.runs:
                continue
            measure(way, figures[name], scratch, memory=number < 0)
            if number >= 0:
                print(f"    {name:<44} {figures[name].seconds[-1]:8.2f} s", file=sys.stderr)
            if way.writes:
                if number < 0:
                    check(way.writes)
                shutil.rmtree(way.writes)
    return figures


def warm(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(8 * MIB):
                pass


def kept_experts(layers: int, scratch: Path) -> Path:
    """Write a choice that differs from layer to layer: two experts, five apart, go."""
    kept = {str(n): [e for e in range(8) if e not in (n % 8, (n + 5) % 8)] for n in range(layers)}
    path = scratch / "kept.json"
    path.write_text(json.dumps(kept))
    return path


def same_as(reference: Path) -> Callable[[Path], None]:
    """Return a check that a folder holds the tensors of ``reference``, by name, shape and sampled bytes."""

    def check(folder: Path) -> None:
        one, other = open_checkpoint(reference), open_checkpoint(folder)
        with ShardReader(one) as ours, ShardReader(other) as theirs:
            for name, tensor in one.tensors.items():
                twin = other.tensors.get(name)
                if twin is None or (twin.dtype, twin.shape) != (tensor.dtype, tensor.shape):
                    raise SystemExit(f"{folder.name} did something else: {name} is {twin}")
                for start in (0, max(0, tensor.nbytes - 4096)):
                    stop = min(start + 4096, tensor.nbytes)
                    if ours.read(tensor, start, stop) != theirs.read(twin, start, stop):
                        raise SystemExit(f"{folder.name} did something else: {name} has other bytes")
        if len(one.tensors) != len(other.tensors):
            raise SystemExit(f"{folder.name} did something else: it has more tensors")

    return check


def copies(source: Path, target: Path) -> dict[str, Way]:
    copy = ["cp", "-r", "--reflink=never", source, target]
    synced = ["sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync "$1"/* "$1"', source, target]
    return {"cp": Way(copy, source, target), "cp + fsync": Way(synced, source, target)}


def tool(*arguments: str | Path) -> list[str | Path]:
    return script(TOOL, *arguments)


def script(text: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-c", text, *arguments]


def of_prune(layout: str, source: Path, scratch: Path, runs: int, transformers_runs: int) -> dict[str, Figures]:
    """Measure the ways to remove experts from ``source``, and the copies of a finished result."""
    kept = kept_experts(open_checkpoint(source).config["num_hidden_layers"], scratch)
    reference, out = scratch / "reference", scratch / "out"
    subprocess.run(
        [sys.executable, "-m", "moesurgeon", "prune", source, reference, "--keep-experts", kept, "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    ways = copies(reference, out)
    ways["moesurgeon prune"] = Way(tool("prune", source, out, "--keep-experts", kept, "--json"), source, out)
    ways["safe_open + save_file"] = Way(script(SAFE_OPEN, source, out, kept), source, out)
    if layout == "per-expert" and transformers_runs:
        stock = Way(script(TRANSFORMERS, source, out, kept), source, out, transformers_runs)
        ways["transformers load + slice + save"] = stock
    figures = take_turns(ways, runs, scratch, same_as(reference))
    shutil.rmtree(reference)
    return {f"{layout}: {name}": of for name, of in figures.items()}


def of_retop(source: Path, small: Path, scratch: Path, runs: int) -> dict[str, Figures]:
    """Measure retop with copies and with links, on two sizes, and what only reads headers."""
    out = scratch / "out"
    ways = copies(source, out)
    ways["moesurgeon retop"] = Way(tool("retop", source, out, "--json"), source, out)
    ways["moesurgeon retop --link"] = Way(tool("retop", source, out, "--link", "--json"), source, out)
    ways["moesurgeon retop --link, a quarter"] = Way(tool("retop", small, out, "--link", "--json"), small, out)
    return {f"whole: {name}": of for name, of in take_turns(ways, runs, scratch, open_checkpoint).items()}


def of_start(source: Path, scratch: Path, runs: int) -> dict[str, Figures]:
    command = [sys.executable, "-m", "moesurgeon"]
    ways = {
        # Long enough to be looked at.
        "python": Way([sys.executable, "-c", "import time; time.sleep(0.1)"]),
        "moesurgeon --help": Way([*command, "--help"]),
        "moesurgeon inspect": Way([*command, "inspect", str(source)]),
    }
    return take_turns(ways, max(runs, 7), scratch, lambda folder: None)


def bars_of(figures: dict[str, Figures]) -> list[tuple[str, float, str, bool]]:
    """Return (what, value, the bar, met) for everything that has a bar."""
    seconds = {name: of.median for name, of in figures.items()}
    bare = max(figures["python"].resident)
    rows: list[tuple[str, float, str, bool]] = []

    def bar(what: str, value: float, limit: float, unit: str, *, least: bool = False) -> None:
        met = value >= limit if least else value <= limit
        rows.append((what, value, f"{'>=' if least else '<='} {limit:g} {unit}".strip(), met))

    for layout in [name.split(":")[0] for name in figures if name.endswith(": moesurgeon prune")]:
        ours = f"{layout}: moesurgeon prune"
        for copy in ("cp", "cp + fsync"):
            bar(f"{layout}: prune / {copy}", seconds[ours] / seconds[f"{layout}: {copy}"], 1.1, "x")
        bar(f"{layout}: prune, memory above python", (max(figures[ours].resident) - bare) / MIB, 64, "MiB")
    stock = "per-expert: transformers load + slice + save"
    if stock in seconds:
        bar("transformers / prune", seconds[stock] / seconds["per-expert: moesurgeon prune"], 20, "x", least=True)
    for copy in ("cp", "cp + fsync"):
        bar(f"retop / {copy}", seconds["whole: moesurgeon retop"] / seconds[f"whole: {copy}"], 1.1, "x")
    linked, quarter = seconds["whole: moesurgeon retop --link"], seconds["whole: moesurgeon retop --link, a quarter"]
    bar("retop --link", linked, 0.5, "s")
    bar("retop --link / of a quarter of the bytes", linked / quarter, 1.25, "x")
    bar("inspect", seconds["moesurgeon inspect"], 0.5, "s")
    bar("--help", seconds["moesurgeon --help"], 0.3, "s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=bytes_from, default="4GB", help="of the checkpoint (default 4GB)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--transformers-runs", type=int, default=1, help="0 leaves the slow one out")
    parser.add_argument("--layouts", nargs="+", default=["per-expert", "fused", "fp8"])
    parser.add_argument("--folder", type=Path, help="where to work: three times --bytes are needed")
    parser.add_argument("--keep", action="store_true", help="leave the working folder")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="moesurgeon-rewrite-", dir=arguments.folder))
    figures: dict[str, Figures] = {}
    try:
        for layout in arguments.layouts:
            print(f"  {layout}, {arguments.bytes / 1e9:g} GB", file=sys.stderr)
            source = make_checkpoint(scratch / layout, arguments.bytes, layout=layout)
            figures |= of_prune(layout, source, scratch, arguments.runs, arguments.transformers_runs)
            if layout == "per-expert":
                small = make_checkpoint(scratch / "small", arguments.bytes // 4)
                figures |= of_retop(source, small, scratch, arguments.runs)
                figures |= of_start(source, scratch, arguments.runs)
            if not arguments.keep:
                shutil.rmtree(source)
    finally:
        if not arguments.keep:
            shutil.rmtree(scratch)
    show(figures)
    bars = bars_of(figures)
    for what, value, limit, met in bars:
        print(f"{what:<46} {value:9.2f}  bar {limit:<10} {'met' if met else 'MISSED'}")
    print(
        json.dumps(
            {
                "bytes": arguments.bytes,
                "figures": {name: of.as_dict() for name, of in figures.items()},
                "bars": {what: {"value": value, "bar": limit, "met": met} for what, value, limit, met in bars},
            }
        )
    )


def show(figures: dict[str, Figures]) -> None:
    print(f"{'':<46} {'median s':>9} {'(min to max)':>18} {'in fsync':>9} {'peak MiB':>9} {'anonymous':>9}")
    for name, of in figures.items():
        spread = f"({min(of.seconds):.2f} to {max(of.seconds):.2f})"
        waited = f"{statistics.median(of.in_fsync):.2f}" if of.in_fsync else ""
        memory = f"{max(of.resident) / MIB:9.0f} {max(of.anonymous) / MIB:9.0f}"
        print(f"{name:<46} {of.median:9.2f} {spread:>18} {waited:>9} {memory}")


if __name__ == "__main__":
    main()
