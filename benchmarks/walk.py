"""The walk next to the plain forward pass, next to its own reading and computing, and next to accelerate's offload.

    python benchmarks/walk.py [--bytes 8GB] [--limit 2.5GB] [--tokens 8192] [--runs 5] [--folder /tmp] [--only PART]

(resident) tokens/s of a walk with all weights in memory against the stock forward pass on the same batches,
both tiny checkpoints and a synthetic Mixtral, in turns. (streamed) a synthetic checkpoint several times larger
than the memory that the process may have: its heap is limited by the kernel (RLIMIT_DATA), ``--max-memory`` is
the same number. Its time is held against that of reading everything without computing (limited, too) and of
computing everything without reading (not limited, all in memory, the second of two walks), each a process of
its own; beside it accelerate's disk offload with the same limit on the same text. Peak memory is taken with two
layers and no more, and with all that the limit allows. (streams) two streams in one walk against one, with so
little text that reading is most of the work.

Before every process of the last two parts the checkpoint's pages are dropped from the cache, so that reading
is reading. Prints tables, ratios against their bars and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as `python benchmarks/walk.py`

from benchmarks.synthetic import bytes_from, make_checkpoint

PARTS = ("resident", "streamed", "streams")
LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=bytes_from, default="8GB", help="of the checkpoint that is streamed")
    parser.add_argument("--limit", type=bytes_from, default="2.5GB", help="memory that a process may have")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work: twice --bytes are needed, for offloading")
    parser.add_argument("--only", choices=PARTS, action="append", help="leave the other parts out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](json.loads(sys.stdin.read()))))
        return
    parts = arguments.only or PARTS
    figures: dict[str, Any] = {}
    bars: dict[str, tuple[float, str, bool]] = {}
    with tempfile.TemporaryDirectory(prefix="moesurgeon-walk-", dir=arguments.folder) as scratch:
        if "resident" in parts:
            figures["resident"] = resident(Path(scratch), arguments.runs, bars)
        if "streamed" in parts or "streams" in parts:
            print(f"  writing {arguments.bytes / 1e9:g} GB", file=sys.stderr)
            source = make_checkpoint(Path(scratch) / "large", arguments.bytes)
            job = {"checkpoint": str(source), "limit": arguments.limit, "tokens": arguments.tokens}
            if "streamed" in parts:
                figures["streamed"] = streamed(job, Path(scratch), bars)
            if "streams" in parts:
                figures["streams"] = streams({**job, "tokens": 64}, arguments.runs, bars)
    for what, (value, limit, met) in bars.items():
        print(f"{what:<64} {value:9.3f}  bar {limit:<10} {'met' if met else 'MISSED'}")
    told = {what: {"value": value, "bar": limit, "met": met} for what, (value, limit, met) in bars.items()}
    print(json.dumps({"figures": figures, "bars": told}))


def resident(scratch: Path, runs: int, bars: dict[str, tuple[float, str, bool]]) -> dict[str, Any]:
    """Measure in turns; a fresh process for each checkpoint."""
    middle = make_checkpoint(scratch / "middle", 400_000_000)
    results = {}
    print(f"{'resident, tokens/s':<34} {'stock':>10} {'walk':>10} {'ratio, median (min to max)':>28}")
    for checkpoint, dtype in (
        ("builtin:tiny-mixtral", "float32"),
        ("builtin:tiny-deepseek", "float32"),
        (str(middle), "float32"),
        (str(middle), "bfloat16"),
    ):
        job = {"checkpoint": checkpoint, "dtype": dtype, "runs": runs}
        found = worker("resident", job)
        name = f"{'synthetic, 0.4 GB' if checkpoint == str(middle) else checkpoint}, {dtype}"
        ratios = [stock / walk for stock, walk in zip(found["stock"], found["walk"], strict=True)]
        ratio = statistics.median(ratios)
        stock, walk = (found["tokens"] / statistics.median(found[side]) for side in ("stock", "walk"))
        print(f"{name:<34} {stock:10,.0f} {walk:10,.0f} {ratio:10.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        results[name] = {**found, "ratio": ratio}
        bars[f"resident walk / stock, tokens/s: {name}"] = (ratio, ">= 1.0", ratio >= 1.0)
    return results


def streamed(job: dict[str, Any], scratch: Path, bars: dict[str, tuple[float, str, bool]]) -> dict[str, Any]:
    limit = job["limit"]
    read = worker("read", job, limit=limit)
    compute = worker("compute", job)
    walk = worker("streamed", {**job, "streams": 1}, limit=limit)
    least = worker("streamed", {**job, "streams": 1, "two_layers": True}, limit=limit)
    stock = worker("offload", {**job, "folder": str(scratch / "offload")}, limit=limit)
    size = walk["bytes"] / 1e9
    print(f"\nstreamed: {size:.1f} GB with {limit / 1e9:g} GB of memory, {walk['tokens']:,} tokens, bfloat16")
    print(f"  reading alone              {read['seconds']:8.2f} s ({size / read['seconds']:.2f} GB/s)")
    print(f"  computing alone            {compute['seconds']:8.2f} s")
    print(f"  walk                       {walk['seconds']:8.2f} s, peak {walk['peak_bytes'] / 1e6:,.0f} MB")
    above, allowed = least["peak_bytes"] - least["before_bytes"], least["allowed_bytes"]
    print(
        f"  walk, two layers at most   {least['seconds']:8.2f} s, peak {least['peak_bytes'] / 1e6:,.0f} MB, of which "
        f"{least['before_bytes'] / 1e6:,.0f} MB are there before; two layers and activations: {allowed / 1e6:,.0f} MB"
    )
    if "error" in stock:
        print(f"  accelerate's disk offload failed: {stock['error']}")
    else:
        print(
            f"  accelerate's disk offload  {stock['seconds']:8.2f} s, after {stock['load_seconds']:.2f} s to load and "
            f"write {stock['written_bytes'] / 1e9:.1f} GB, peak {stock['peak_bytes'] / 1e6:,.0f} MB"
        )
    for what, value, bar in (
        ("time / max(reading, computing)", walk["seconds"] / max(read["seconds"], compute["seconds"]), 1.2),
        ("peak memory / limit", walk["peak_bytes"] / limit, 1.0),
        ("growth with two layers / (two layers + activations)", above / allowed, 1.0),
    ):
        bars[f"streamed: {what}"] = (value, f"<= {bar}", value <= bar)
    return {"read": read, "compute": compute, "walk": walk, "two_layers": least, "accelerate": stock}


def streams(job: dict[str, Any], runs: int, bars: dict[str, tuple[float, str, bool]]) -> dict[str, Any]:
    found = [
        [worker("streamed", {**job, "streams": count, "two_layers": True}, limit=job["limit"]) for count in (1, 2)]
        for _ in range(runs)
    ]
    ratios = [two["seconds"] / one["seconds"] for one, two in found]
    ratio = statistics.median(ratios)
    print(f"\ntwo streams with {job['tokens']} tokens cost {ratio:.2f} x one ({min(ratios):.2f} to {max(ratios):.2f})")
    bars["two streams / one, mostly reading"] = (ratio, "<= 1.6", ratio <= 1.6)
    return {"runs": found, "ratio": ratio}


def worker(name: str, job: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """Run one of ``WORKERS`` in a process of its own, whose heap may not grow over ``limit``."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    if not job["checkpoint"].startswith("builtin:"):
        drop_from_cache(Path(job["checkpoint"]))
    command = [sys.executable, __file__, "--worker", name]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, preexec_fn=limited, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        if name == "offload":  # which may well not fit
            return {"error": lines[-1][:300]}
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def work_resident(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from moesurgeon.engine.streams import Stream
    from moesurgeon.engine.walk import Walk

    source, batches = opened(job)
    stream = Stream(source)
    root = job["root"]
    stock = AutoModelForCausalLM.from_pretrained(root, dtype=source.placement.dtype, local_files_only=True).eval()

    @torch.no_grad()
    def plain() -> None:
        for batch in batches:
            stock.base_model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)

    def ours() -> None:
        Walk([stream], batches).through()

    seconds: dict[str, list[float]] = {"stock": [], "walk": []}
    for side in (plain, ours):
        side()
    for number in range(job["runs"]):
        for name, side in (("stock", plain), ("walk", ours))[:: 1 if number % 2 else -1]:
            seconds[name].append(timed(side))
    return {**seconds, "tokens": sum(batch.tokens.numel() for batch in batches)}


def work_streamed(job: dict[str, Any]) -> dict[str, Any]:
    from moesurgeon.engine.budget import Demand, share_out
    from moesurgeon.engine.streams import Overlay, Stream
    from moesurgeon.engine.walk import Walk
    from moesurgeon.engine.working import layer_bytes
    from moesurgeon.surgery.retop import RetopSpec, plan_retop

    source, batches = opened({**job, "dtype": "bfloat16"})
    memory = share_out(job["limit"], [source], lambda _tokens: Demand(batches=batches))
    fits = not memory.hidden_in_files
    if job.get("two_layers"):
        source.supply.allow(source.supply.least)
    overlays = [Overlay(), Overlay(plan=plan_retop(source.anatomy, RetopSpec()))][: job["streams"]]
    walking = [Stream(source, overlay) for overlay in overlays]
    tokens = sum(batch.tokens.numel() for batch in batches)
    hidden = tokens * source.anatomy.hidden * source.placement.dtype.itemsize
    before = resident_bytes()
    with tempfile.TemporaryDirectory() as folder:
        walk = Walk(walking, batches, None if fits else Path(folder))
        seconds = timed(walk.through)
    return {
        "seconds": seconds,
        "compute_seconds": float(sum(each.sum() for each in walk.seconds.values())),
        "peak_bytes": peak_bytes(),
        "before_bytes": before,
        "allowed_bytes": source.supply.least + hidden + layer_bytes(source, batches),
        "bytes": sum(spec.nbytes for spec in source.anatomy.tensors.values()),
        "tokens": tokens,
        "hidden_in_file": not fits,
    }


def work_read(job: dict[str, Any]) -> dict[str, Any]:
    source, _batches = opened({**job, "dtype": "bfloat16"})
    source.supply.allow(source.supply.least)

    def read() -> None:
        for _group in source.supply.walk():
            pass

    return {"seconds": timed(read)}


def work_compute(job: dict[str, Any]) -> dict[str, Any]:
    from moesurgeon.engine.streams import Stream
    from moesurgeon.engine.walk import Walk

    source, batches = opened({**job, "dtype": "bfloat16"})
    stream = Stream(source)
    return {"seconds": min(timed(Walk([stream], batches).through) for _ in range(2))}


def work_offload(job: dict[str, Any]) -> dict[str, Any]:
    """What accelerate offers for the same purpose: whatever does not fit is written to an offload folder."""
    import torch
    from transformers import AutoModelForCausalLM

    _source, batches = opened({**job, "dtype": "bfloat16"})
    room = max(0, job["limit"] - resident_bytes() - 900_000_000)  # a layer and what a batch needs
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        job["checkpoint"],
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": room},
        offload_folder=job["folder"],
        local_files_only=True,
    ).eval()
    loaded = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model.base_model(input_ids=batch.tokens, use_cache=False)
    done = time.perf_counter()
    written = sum(path.stat().st_size for path in Path(job["folder"]).rglob("*") if path.is_file())
    return {
        "load_seconds": loaded - started,
        "seconds": done - loaded,
        "written_bytes": written,
        "peak_bytes": peak_bytes(),
    }


def opened(job: dict[str, Any]) -> Any:
    """Return the source and the batches of a job; puts the checkpoint's folder into it."""
    import torch
    import transformers

    from moesurgeon.engine.batches import Batch, batches_of, rows_for
    from moesurgeon.engine.device import Placement
    from moesurgeon.engine.streams import Source
    from moesurgeon.pipeline.options import Text
    from moesurgeon.pipeline.subject import open_subject
    from moesurgeon.pipeline.text import read_text

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    subject = open_subject(job["checkpoint"])
    job["root"] = subject.root
    placement = Placement(torch.device("cpu"), getattr(torch, job["dtype"]))
    source = Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement)
    if job["checkpoint"].startswith("builtin:"):
        corpus = read_text(subject, Text(max_tokens=32768), builtin_split="report")
        return source, list(batches_of(corpus, rows=rows_for(LENGTH), device=placement.device))
    tokens, length = job.get("tokens", 8192), min(LENGTH, job.get("tokens", LENGTH))
    rows = min(rows_for(LENGTH), tokens // length)
    generator = torch.Generator().manual_seed(0)
    vocabulary = subject.anatomy.config["vocab_size"]
    batches = [
        Batch("random", (), torch.randint(vocabulary, (rows, length), generator=generator), None)
        for _ in range(max(1, tokens // (rows * length)))
    ]
    return source, batches


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


WORKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "resident": work_resident,
    "read": work_read,
    "compute": work_compute,
    "streamed": work_streamed,
    "offload": work_offload,
}


if __name__ == "__main__":
    main()
