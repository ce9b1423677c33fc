"""The profile next to the plain forward pass, next to keeping activations, and next to llm-compressor's REAP.

    python benchmarks/profiling.py [--runs 5] [--threads 1] [--tokens 65536] [--only PART]

(speed) tokens/s of a profile with all weights in memory against the stock forward pass on the same batches, both
tiny checkpoints and a synthetic Mixtral of 0.4 GB, in turns, in seconds of the processor (other work on the machine
does not count), both with the experts in a loop, the fastest way on a CPU; beside it what --inner 1024 adds.
(memory) the peak of a profile over that of the stock pass, next to the bytes of the experts' outputs that a
statistic would be taken from if they were kept. (reap) llm-compressor's REAPPruningModifier on the same model and
text, where the package can be imported: its time, and whether both rank and pick the same experts (peer_reap.py says
why scores differ a little).

Every figure is from a process of its own. Prints tables, ratios against their bars and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As `python benchmarks/profiling.py`, whose folder would hide the profile of the standard library.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.synthetic import make_checkpoint  # noqa: E402 - after its path
from benchmarks.workers import worker  # noqa: E402

PARTS = ("speed", "memory", "reap")
TINY = ("builtin:tiny-mixtral", "builtin:tiny-deepseek")
LENGTH = 512
Bars = dict[str, tuple[float, str, bool]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch; with more, seconds of the clock are counted")
    parser.add_argument("--tokens", type=int, default=65536, help="the command's own default")
    parser.add_argument("--folder", type=Path, help="where to work: 0.4 GB are needed")
    parser.add_argument("--only", choices=PARTS, action="append", help="leave the other parts out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](json.loads(sys.stdin.read()))))
        return
    parts = arguments.only or PARTS
    common = {"runs": arguments.runs, "threads": arguments.threads}
    figures: dict[str, Any] = {}
    bars: Bars = {}
    with tempfile.TemporaryDirectory(prefix="moesurgeon-profile-", dir=arguments.folder) as scratch:
        middle = make_checkpoint(Path(scratch) / "middle", 400_000_000)
        jobs = [{**common, "checkpoint": name, "tokens": arguments.tokens} for name in TINY]
        jobs.append({**common, "checkpoint": str(middle), "tokens": min(8192, arguments.tokens)})
        if "speed" in parts:
            figures["speed"] = speed(jobs, bars)
        if "memory" in parts:
            figures["memory"] = memory(jobs)
        if "reap" in parts:
            figures["reap"] = reap(jobs[0], bars)
    for what, (value, limit, met) in bars.items():
        print(f"{what:<60} {value:9.3f}  bar {limit:<10} {'met' if met else 'MISSED'}")
    told = {what: {"value": value, "bar": limit, "met": met} for what, (value, limit, met) in bars.items()}
    print(json.dumps({"figures": figures, "bars": told}))


def speed(jobs: list[dict[str, Any]], bars: Bars) -> dict[str, Any]:
    print(f"{'tokens/s':<24} {'stock':>9} {'profile':>9} {'--inner 1024':>13} {'profile / stock (min to max)':>30}")
    results = {}
    for job in jobs:
        found, name = worker(__file__, "speed", job), named(job)
        ratios = [stock / ours for stock, ours in zip(found["stock"], found["profile"], strict=True)]
        ratio = statistics.median(ratios)
        rates = {side: found["tokens"] / statistics.median(found[side]) for side in ("stock", "profile", "inner")}
        print(
            f"{name:<24} {rates['stock']:9,.0f} {rates['profile']:9,.0f} {rates['inner']:13,.0f} "
            f"{ratio:13.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
        results[name] = {**found, "tokens_per_second": rates, "ratio": ratio}
        bars[f"profile / stock forward pass, tokens/s: {name}"] = (ratio, ">= 0.95", ratio >= 0.95)
    return results


def memory(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    print(f"\n{'memory over the stock pass, MB':<34} {'profile':>9} {'outputs of experts, all text':>30}")
    results = {}
    for job in jobs:
        stock, ours = (
            worker(__file__, "peak", {**job, "side": "stock"}),
            worker(__file__, "peak", {**job, "side": "profile"}),
        )
        over = ours["peak_bytes"] - stock["peak_bytes"]
        print(f"{named(job):<34} {over / 1e6:9.1f} {ours['outputs_bytes'] / 1e6:30,.1f}")
        results[named(job)] = {"stock": stock, "profile": ours, "over_bytes": over}
    return results


def reap(job: dict[str, Any], bars: Bars) -> dict[str, Any]:
    found = worker(__file__, "reap", job)
    if "skipped" in found:
        print(f"\nllm-compressor's REAP is left out: {found['skipped']}")
        return found
    ratio = found["theirs_seconds"] / found["profile_seconds"]
    print(
        f"\nREAP, {found['tokens']:,} tokens: llm-compressor {found['theirs_seconds']:.1f} s, profile "
        f"{found['profile_seconds']:.1f} s; the same {found['keep']} of {found['experts']} experts stay in "
        f"{found['same_layers']} of {found['layers']} layers; rank correlation {found['rank_correlation']:.4f}; scores "
        f"of the first layer differ by {found['difference_by_layer'][0]:.1e}, of the last, which saw theirs cut, by "
        f"{found['difference_by_layer'][-1]:.1e}"
    )
    bars["profile / llm-compressor's REAP calibration, tokens/s"] = (ratio, ">= 1.0", ratio >= 1.0)
    return found


def named(job: dict[str, Any]) -> str:
    return job["checkpoint"] if job["checkpoint"] in TINY else "synthetic, 0.4 GB"


def work_speed(job: dict[str, Any]) -> dict[str, Any]:
    from moesurgeon.engine.streams import Stream
    from moesurgeon.profiling.all_experts import AllExperts, InnerSpec
    from moesurgeon.profiling.profiler import take_profile

    source, domains, batches, stock = opened(job)
    stream = Stream(source)

    def inner() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "inner.safetensors"
            experts = AllExperts(source.anatomy, domains, batches, InnerSpec(tokens=1024), path)
            experts.open()
            take_profile(stream, domains, batches, extras=[experts])

    sides: dict[str, Callable[[], object]] = {
        "stock": stock,
        "profile": lambda: take_profile(stream, domains, batches),
        "inner": inner,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for number in range(job["runs"]):
        for name, side in list(sides.items())[:: 1 if number % 2 else -1]:
            seconds[name].append(timed(side, job["threads"]))
    return {**seconds, "tokens": sum(batch.text_tokens for batch in batches)}


def work_peak(job: dict[str, Any]) -> dict[str, Any]:
    """Return the largest physical memory of one pass, and what the outputs of the chosen experts would take."""
    from moesurgeon.engine.streams import Stream
    from moesurgeon.profiling.profiler import take_profile

    source, domains, batches, stock = opened(job, with_stock=job["side"] == "stock")
    anatomy = source.anatomy
    if job["side"] == "stock":
        stock()
    else:
        take_profile(Stream(source), domains, batches)
    tokens = sum(batch.text_tokens for batch in batches)
    return {
        "peak_bytes": peak_bytes(),
        "outputs_bytes": tokens * len(anatomy.moe_layers) * anatomy.top_k * anatomy.hidden * 4,
    }


def work_reap(job: dict[str, Any]) -> dict[str, Any]:
    """Run llm-compressor's one-shot REAP on the same windows of full length, and compare scores, ranks and picks."""
    from benchmarks.peer_reap import MISSING, is_installed, reap_of_llmcompressor

    if not is_installed():
        return {"skipped": MISSING}
    import numpy as np

    from moesurgeon.engine.batches import batches_of, rows_for
    from moesurgeon.engine.streams import Stream
    from moesurgeon.profiling.profiler import take_profile
    from moesurgeon.traces.windows import Corpus

    source, domains, batches, _ = opened(job, with_stock=False)
    anatomy, keep = source.anatomy, source.anatomy.experts * 3 // 4
    windows = [window for batch in batches for window in batch.windows if len(window.tokens) == LENGTH]
    windows = windows[: len(windows) // rows_for(LENGTH) * rows_for(LENGTH)]  # theirs leaves an incomplete batch out
    corpus = Corpus(windows=windows, tokens=dict.fromkeys(domains, 0))
    batches = list(batches_of(corpus, rows=rows_for(LENGTH), device=source.placement.device))
    taken: list[Any] = []
    ours = min(
        timed(lambda: taken.append(take_profile(Stream(source), domains, batches)), job["threads"]) for _ in range(3)
    )
    scores_LE = taken[0].total("weighted_norm") / np.maximum(taken[0].total("tokens"), 1)
    clock = time.process_time if job["threads"] == 1 else time.perf_counter
    theirs = reap_of_llmcompressor(
        job["root"], windows, length=LENGTH, batch=rows_for(LENGTH), experts=anatomy.experts, keep=keep, runs=2,
        clock=clock,
    )  # fmt: skip
    picks = [tuple(sorted(np.argsort(-row, kind="stable")[:keep].tolist())) for row in scores_LE]
    ranks = [[np.argsort(np.argsort(each)) for each in pair] for pair in zip(scores_LE, theirs.saliencies, strict=True)]
    return {
        "tokens": len(windows) * LENGTH,
        "theirs_seconds": min(theirs.seconds),
        "profile_seconds": ours,
        "layers": len(anatomy.moe_layers),
        "experts": anatomy.experts,
        "keep": keep,
        "same_layers": sum(pick == theirs.kept[layer] for pick, layer in zip(picks, anatomy.moe_layers, strict=True)),
        "rank_correlation": float(np.mean([np.corrcoef(*pair)[0, 1] for pair in ranks])),
        # Theirs cuts each layer before it goes on, so that later ones see what the cut did.
        "difference_by_layer": np.abs(np.array(theirs.saliencies) / scores_LE - 1).max(axis=1).tolist(),
    }


def opened(job: dict[str, Any], *, with_stock: bool = True) -> Any:
    """Return source, domains, batches and the stock forward pass of a job; puts the checkpoint's folder into it."""
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from moesurgeon.engine.batches import batches_of, rows_for
    from moesurgeon.engine.device import Placement
    from moesurgeon.engine.streams import Source
    from moesurgeon.pipeline.options import Text
    from moesurgeon.pipeline.subject import open_subject
    from moesurgeon.pipeline.text import read_text
    from moesurgeon.traces.windows import Corpus, Window

    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    subject = open_subject(job["checkpoint"])
    job["root"] = str(subject.root)
    placement = Placement(torch.device("cpu"), torch.float32)
    source = Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement)
    if job["checkpoint"] in TINY:
        corpus = read_text(subject, Text(max_tokens=job["tokens"]), builtin_split="calibration")
    else:
        rng = np.random.default_rng(0)
        shape = (job["tokens"] // LENGTH, LENGTH)
        rows = rng.integers(subject.anatomy.config["vocab_size"], size=shape).astype(np.int32)
        corpus = Corpus(
            windows=[Window("random", number, 0, row) for number, row in enumerate(rows)], tokens={"random": rows.size}
        )
    batches = list(batches_of(corpus, rows=rows_for(LENGTH), device=placement.device))
    if not with_stock:
        return source, corpus.domains, batches, None
    model = AutoModelForCausalLM.from_pretrained(
        subject.root, dtype=placement.dtype, local_files_only=True, experts_implementation="eager"
    ).eval()

    @torch.no_grad()
    def stock() -> None:
        for batch in batches:
            model.base_model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)

    return source, corpus.domains, batches, stock


def timed(work: Callable[[], object], threads: int) -> float:
    """Return the seconds of ``work``: of the processor where one thread computes, else of the clock."""
    clock = time.process_time if threads == 1 else time.perf_counter
    started = clock()
    work()
    return clock() - started


def peak_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


WORKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "speed": work_speed,
    "peak": work_peak,
    "reap": work_reap,
}


if __name__ == "__main__":
    main()
