"""What healing costs: tokens/s next to a plain forward pass, peak memory, and how both grow; then larger checkpoints.

    python benchmarks/heal_cost.py [--quick] [--only PART] [--runs 2] [--threads 1] [--device cpu] [--json FILE]
    python benchmarks/heal_cost.py --hidden 512 --experts 8 4 16 --widths 1024 512 2048 --tokens 16384 65536 --steps 20

(rates) What the machine does of each piece in a second, with matrices of the size of an expert of each checkpoint
below: float32 products, products for the sums, Cholesky, training steps, Adam. (grow) A synthetic Mixtral of one layer,
from which a quarter of the experts is cut: the stock forward pass, ridge, ridge with a rank, and distillation, in
turns, over the number of experts, their width and the number of tokens, one at a time; beside it which share of the
time the FLOPs of the pieces over their rates make up. (memory) The peak of each above what was there before, next to
what ``healing.memory`` says it takes, each in a process of its own; at the first sizes and the largest ones. (project)
Mixtral-8x7B and DeepSeek-MoE-16B with a quarter of the experts cut, from their configs alone: memory by
``healing_bytes``, and hours by the same FLOPs over rates, divided by the share that was found at the largest sizes of
(grow). ``--rates NAME=FILE`` adds the JSON file of this script from another machine, with --only rates --only grow.

One layer of text goes in turns; seconds of the processor where one thread computes on a CPU, else of the clock. About
7 minutes on one quiet core, of which (rates) 1.5; needs 4 GB of memory. Prints tables and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as `python benchmarks/heal_cost.py`

from benchmarks.cost_pieces import WAYS, Rates, Size, pieces, ratios_of, seconds_of  # noqa: E402 - after its path
from benchmarks.cost_rates import machine_name, work_machine, work_rates  # noqa: E402
from benchmarks.cost_real import HELDOUT, REAL, TOKENS, work_account  # noqa: E402
from benchmarks.cost_runs import pace_of, size_of, work_peak, work_speed  # noqa: E402
from benchmarks.synthetic import Geometry, make_checkpoint  # noqa: E402
from benchmarks.workers import worker  # noqa: E402
from moesurgeon.healing.pace import Pace  # noqa: E402

PARTS = ("rates", "grow", "memory", "project")
GROWING = ("experts", "width", "tokens")
SIZES = {"hidden": [256], "experts": [8, 4, 16], "width": [256, 512, 1024], "tokens": [8192, 16384, 32768]}
QUICK = {"hidden": [64], "experts": [4, 8], "width": [64, 128], "tokens": [1024, 2048]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not what it costs")
    parser.add_argument("--hidden", type=int, nargs=1, help="default: 256")
    parser.add_argument("--experts", type=int, nargs="+", help="the first stays while others change; default: 8 4 16")
    parser.add_argument("--widths", type=int, nargs="+", dest="width", help="default: 256 512 1024")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 8192 16384 32768; judged on an eighth more")
    parser.add_argument("--runs", type=int, help="default: 2")
    parser.add_argument("--steps", type=int, help="of the distillation that is measured; default: 20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=PARTS, action="append", help="leave the other parts out; repeat for more")
    parser.add_argument("--rates", action="append", default=[], metavar="NAME=FILE", help="of another machine")
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(WORKERS[given.worker](json.loads(sys.stdin.read()))))
        return
    parts = given.only or PARTS
    sizes = {name: getattr(given, name) or usual for name, usual in (QUICK if given.quick else SIZES).items()}
    common = {
        "threads": given.threads, "device": given.device, "quick": given.quick, "rank": max(1, sizes["width"][0] // 8),
        "runs": given.runs or (1 if given.quick else 2), "steps": given.steps or (2 if given.quick else 20),
    }  # fmt: skip
    found: dict[str, Any] = {"options": common, "machine": worker(__file__, "machine", common), "rates": {}}
    print(machine_name(found["machine"]), flush=True)
    jobs = [{**common, **each} for each in settings(sizes)]
    for name, shape in shapes(jobs, parts).items():
        found["rates"][name] = worker(__file__, "rates", {**common, **shape})
        show_rates(name, shape, found["rates"][name])
    with tempfile.TemporaryDirectory(prefix="moesurgeon-heal-") as scratch:
        for job in jobs:
            job["checkpoint"] = str(Path(scratch) / "{experts} {width}".format(**job))
            if not Path(job["checkpoint"]).exists() and {"grow", "memory"} & set(parts):
                make_checkpoint(Path(job["checkpoint"]), 1, geometry=Geometry(
                    hidden=job["hidden"], width=job["width"], experts=job["experts"], vocabulary=256))  # fmt: skip
        if "grow" in parts:
            found["grow"] = [grown(job, found["rates"][shape_name(job)]) for job in jobs]
            found["ratios"] = ratios_of(found["grow"], GROWING)
            show_ratios(found["ratios"])
        if "memory" in parts:
            ends = [job for job in jobs if job is jobs[0] or any(job[name] == max(sizes[name]) for name in GROWING)]
            found["memory"] = [row for job in ends for row in peaks(job)]
    if "project" in parts:
        found["project"] = projected({"this machine": found, **others(given.rates)})
    print(json.dumps(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def settings(sizes: dict[str, list[int]]) -> list[dict[str, int]]:
    """Return the sizes to measure: the first of each, and one of them changed at a time.

    >>> [each["tokens"] for each in settings({"experts": [8], "tokens": [1024, 2048]})]
    [1024, 2048]
    """
    base = {name: values[0] for name, values in sizes.items()}
    return [base, *({**base, name: value} for name, values in sizes.items() for value in values[1:])]


def shapes(jobs: list[dict[str, Any]], parts: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the experts to take rates with, by name: of what (grow) heals, and of the real checkpoints."""
    found: dict[str, dict[str, int]] = {}
    for job in jobs if "grow" in parts else ():
        wide, share = size_of(job).parts[0]
        step = round(pace_of(job).tokens_per_step * share)
        shape = {"hidden": job["hidden"], "width": wide, "expert_tokens": round(job["tokens"] * share)}
        found.setdefault(shape_name(job), {**shape, "step_tokens": step})
    for name, real in REAL.items() if {"rates", "project"} & set(parts) else ():
        small = {"hidden": 64, "width": 128} if jobs[0]["quick"] else {"hidden": real.hidden, "width": real.width}
        tokens = {
            "expert_tokens": round(TOKENS * real.share),
            "step_tokens": round(Pace().tokens_per_step * real.share),
        }
        found[name] = {**small, **tokens}
    return found


def shape_name(job: dict[str, Any]) -> str:
    return f"H {job['hidden']} F {job['width']}"


def show_rates(name: str, shape: dict[str, int], rates: Rates) -> None:
    names = {"forward": "forward", "sums": "sums", "solve": "Cholesky", "train": "training steps"}
    said = ", ".join(f"{title} {rates[kind] / 1e9:,.1f} GFLOP/s" for kind, title in names.items())
    sizes = f"{shape['hidden']} x {shape['width']}"
    print(f"{name}, an expert of {sizes}: {said}, Adam {rates['adam'] / 1e6:,.0f} M parameters/s", flush=True)


def grown(job: dict[str, Any], rates: Rates) -> dict[str, Any]:
    found = worker(__file__, "speed", job)
    size, pace, tokens = size_of(job), pace_of(job), found["tokens"]
    medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
    predicted = {way: seconds_of(pieces(size, way, tokens, found["heldout"], pace), rates) for way in WAYS}
    step = (medians["distill"] - medians["ridge"]) / pace.steps
    said = (f"{way} {tokens / medians[way]:9,.0f} (predicted {predicted[way] / medians[way]:.2f})" for way in WAYS)
    print(
        f"E {job['experts']:>3} F {job['width']:>5} N {job['tokens']:>6}: tokens/s: stock forward "
        f"{tokens / medians['stock']:9,.0f}, {', '.join(said)}; a step {step * 1e3:,.1f} ms",
        flush=True,
    )
    speeds = {name: tokens / each for name, each in medians.items()}
    sizes = {name: job[name] for name in ("hidden", *GROWING)}
    return {**found, **sizes, "measured": medians, "predicted": predicted, "tokens_per_second": speeds, "step_s": step}


def show_ratios(ratios: dict[str, dict[str, float]]) -> None:
    print("predicted / measured at the largest sizes measured:", flush=True)
    for way, each in ratios.items():
        print(f"  {way:<8} {', '.join(f'{title} {ratio:.2f}' for title, ratio in each.items())}", flush=True)


def peaks(job: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for way in WAYS:
        found = worker(__file__, "peak", {**job, "way": way})
        rows.append({**{name: job[name] for name in ("hidden", *GROWING)}, "way": way, **found})
        print(
            f"E {job['experts']:>3} F {job['width']:>5} N {job['tokens']:>6} {way:<8} peak "
            f"{found['over_bytes'] / 1e6:8,.0f} MB above what was there, {found['account_bytes'] / 1e6:8,.0f} by the "
            "account",
            flush=True,
        )
    return rows


def others(given: list[str]) -> dict[str, dict[str, Any]]:
    """Return by name what this script found on other machines."""
    pairs = (each.partition("=") for each in given)
    return {name: json.loads(Path(path).read_text(encoding="utf-8")) for name, _, path in pairs}


def projected(machines: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Print and return hours and memory for real configs, healed as by default."""
    pace = Pace()
    print(
        f"\nProjection: {TOKENS:,} tokens, at most {pace.steps} steps of {pace.tokens_per_step:,}, computed in float32."
    )
    for name, of in machines.items():
        by = "as the formula predicts, not held against measured times (no --only grow)"
        if "ratios" in of:
            largest = ", ".join(title for title in of["ratios"]["ridge"] if title != "median")
            by = f"by the formula, divided by the median of predicted / measured at the largest sizes ({largest})"
        tiny = "; --quick, whether it runs, not what it costs" if of["options"]["quick"] else ""
        print(f"Hours of {name} ({machine_name(of['machine'])}): {by}{tiny}.")
    rows = []
    for name, real in REAL.items():
        for way, (method, low) in WAYS.items():
            pace = Pace(rank=real.rank if low else None)
            found = worker(__file__, "account", {"name": name, "method": method, "rank": pace.rank, "threads": 1})
            size = Size(**{**found["size"], "parts": tuple(map(tuple, found["size"]["parts"]))})
            made = pieces(size, way, TOKENS, HELDOUT, pace)
            ratios = {each: of.get("ratios", {}).get(way, {}).get("median") for each, of in machines.items()}
            predicted = {
                each: found["layers"] * seconds_of(made, of["rates"][name]) / 3600 for each, of in machines.items()
            }
            hours = {each: predicted[each] / (ratio or 1.0) for each, ratio in ratios.items()}
            said = "; ".join(
                f"{each} {hour:,.2f} h"
                + (f" ({predicted[each]:,.2f} / {ratio:.2f})" if (ratio := ratios[each]) else "")
                for each, hour in hours.items()
            )
            title = f"ridge, rank {real.rank}" if low else way
            work, held = (found[kind] / 1e9 for kind in ("work", "held"))
            print(
                f"{name:<18} {title:<16} a layer at work {work:6.1f} GB, data and healed tensors {held:6.1f} GB "
                f"(may be files); {said}",
                flush=True,
            )
            by = {"pieces": made, "predicted_hours": predicted, "ratios": ratios, "hours": hours}
            rows.append({"checkpoint": name, "way": title, **found, **by})
    return rows


WORKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "machine": work_machine,
    "rates": work_rates,
    "speed": work_speed,
    "peak": work_peak,
    "account": work_account,
}


if __name__ == "__main__":
    main()
