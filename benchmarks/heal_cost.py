"""What healing costs: tokens/s next to a plain forward pass, peak memory, and how both grow; then larger checkpoints.

    python benchmarks/heal_cost.py [--quick] [--runs 2] [--threads 1] [--device cpu] [--only PART] [--json FILE]
                                   [--rates NAME=FILE]

(grow) A synthetic Mixtral of one layer, from which a quarter of the experts is cut: the stock forward pass, ridge,
ridge with a rank, and distillation, in turns, over the number of experts, their width and the number of tokens, one
at a time; beside it what the pieces of (rates) predict. (memory) The peak of each above what was there before, next
to what ``healing.memory`` says it takes, each in a process of its own. (rates) What the machine does of each piece
in a second: float32 products, products for the sums, Cholesky, training steps, Adam. (project) Mixtral-8x7B and
DeepSeek-MoE-16B with a quarter of the experts cut, from their configs alone: FLOPs of the pieces over those rates,
memory by ``healing_bytes``. ``--rates`` adds a device class: the JSON file of this script with --only rates on another
machine.

One layer of text goes in turns; seconds of the processor where one thread computes on a CPU, else of the clock.
Prints tables and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as `python benchmarks/heal_cost.py`

from benchmarks.synthetic import Geometry, make_checkpoint
from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.healing.pace import Method, Pace

PARTS = ("grow", "memory", "rates", "project")
LENGTH, HELDOUT = 512, 16384
BASE = {"hidden": 256, "experts": 8, "width": 1024, "tokens": 16384}
GROW: dict[str, tuple[int, ...]] = {
    "experts": (4, 8, 16), "width": (512, 1024, 2048), "tokens": (16384, 32768, 65536),
}  # fmt: skip
QUICK = {"hidden": 64, "experts": 4, "width": 128, "tokens": 2048}
QUICK_GROW: dict[str, tuple[int, ...]] = {"experts": (4, 8), "width": (64, 128), "tokens": (1024, 2048)}
WAYS: dict[str, tuple[Method, bool]] = {
    "ridge": ("ridge", False),
    "low": ("ridge", True),
    "distill": ("distill", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not what it costs")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of the distillation that is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=PARTS, action="append", help="leave the other parts out")
    parser.add_argument("--rates", action="append", default=[], metavar="NAME=FILE", help="of another machine")
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(WORKERS[given.worker](json.loads(sys.stdin.read()))))
        return
    parts, base, grow = given.only or PARTS, *((QUICK, QUICK_GROW) if given.quick else (BASE, GROW))
    common = {"threads": given.threads, "device": given.device, "quick": given.quick, "rank": base["width"] // 8,
              "runs": 1 if given.quick else given.runs, "steps": 2 if given.quick else given.steps}  # fmt: skip
    found: dict[str, Any] = {"options": common}
    if {"rates", "project", "grow"} & set(parts):
        found["rates"] = worker("rates", common)
        show_rates(found["rates"])
    with tempfile.TemporaryDirectory(prefix="moesurgeon-heal-") as scratch:
        jobs = [{**common, **sizes} for sizes in settings(base, grow)]
        for job in jobs:
            job["checkpoint"] = str(Path(scratch) / "{experts} {width}".format(**job))
            if not Path(job["checkpoint"]).exists() and {"grow", "memory"} & set(parts):
                make_checkpoint(Path(job["checkpoint"]), 1, geometry=Geometry(
                    hidden=job["hidden"], width=job["width"], experts=job["experts"], vocabulary=256))  # fmt: skip
        if "grow" in parts:
            found["grow"] = [grown(job, found["rates"]) for job in jobs]
        if "memory" in parts:
            found["memory"] = [row for job in jobs for row in peaks(job)]
    if "project" in parts:
        rates = {f"this machine, {given.device}": found["rates"]}
        for each in given.rates:
            name, _, path = each.partition("=")
            rates[name] = json.loads(Path(path).read_text(encoding="utf-8"))["rates"]
        found["project"] = projected(rates)
    print(json.dumps(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def settings(base: dict[str, int], grow: dict[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """Return the sizes to measure: the base, and one of them changed at a time.

    >>> len(settings(BASE, GROW))
    7
    """
    found = [base]
    for name, values in grow.items():
        found += [{**base, name: value} for value in values if value != base[name]]
    return found


@dataclass(frozen=True, kw_only=True)
class Size:
    """What FLOPs follow from, of one layer after the cut: ``parts`` (width, share of the tokens) of its maps."""

    hidden: int
    top_k: int
    parts: tuple[tuple[int, float], ...]
    other: int
    """FLOPs of a token in the rest of the layer."""

    @property
    def block(self) -> float:
        """FLOPs of a token in the block."""
        return sum(share * 6 * self.hidden * wide for wide, share in self.parts)

    @property
    def parameters(self) -> int:
        return sum(3 * self.hidden * wide for wide, _share in self.parts)


def pieces(size: Size, way: str, tokens: int, heldout: int, pace: Pace) -> dict[str, float]:
    """Return FLOPs by kind of piece (and Adam's updates of a parameter) of healing one layer.

    The walk: teacher once, student twice, and its block for the errors. A refit, for each of two sweeps: activations
    for the sums of both texts and for the update (with a rank also for the passes of the range finder), their
    products, and for each of five lambdas a factorisation, a solution and an error.
    """
    from moesurgeon.healing.normal import PASSES
    from moesurgeon.healing.ridge import LAMBDAS, SWEEPS

    high, both = size.hidden, tokens + heldout
    made = {"forward": both * (3 * (size.other + size.block) + size.block) + 3 * heldout * size.block}
    made |= dict.fromkeys(("sums", "solve", "train", "adam"), 0.0)
    for wide, share in size.parts:
        rank = pace.rank if way == "low" and pace.rank is not None and pace.rank < wide else wide
        again = (PASSES * share * tokens) if rank < wide else 0.0
        made["forward"] += SWEEPS * 4 * high * wide * (2 * share * both + again)
        per_token = 2 * rank * rank + 2 * high * rank + 2 * high * wide + (2 * wide * rank if rank < wide else 0)
        made["sums"] += SWEEPS * (share * both * per_token + again * 4 * wide * rank)
        solve = rank**3 / 3 + 2 * rank * rank * high + 2 * rank * rank * high
        made["solve"] += SWEEPS * (len(LAMBDAS) * solve + (PASSES * 4 * wide * rank * rank if rank < wide else 0))
    if way == "distill":
        made["train"] += 3 * size.block * pace.tokens_per_step * pace.steps
        made["forward"] += size.block * heldout * (pace.steps // pace.judge_every + 2)
        made["adam"] += size.parameters * pace.steps
    return made


def seconds_of(made: dict[str, float], rates: dict[str, float]) -> float:
    return sum(amount / rates[kind] for kind, amount in made.items())


def size_of(job: dict[str, Any]) -> Size:
    """Return the synthetic layer after a quarter of its experts was cut."""
    kept, high = job["experts"] * 3 // 4, job["hidden"]
    attention = 2 * high * high * 2.5 + 4 * high * LENGTH  # its projections and, on average, its scores
    return Size(hidden=high, top_k=2, parts=((job["width"], 2 / kept),) * kept, other=int(attention))


def grown(job: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    found = worker("speed", job)
    size, pace = size_of(job), pace_of(job)
    medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
    row: dict[str, Any] = {**{name: job[name] for name in BASE}, "heldout": found["heldout"], **found, "predicted": {}}
    said = []
    for way in WAYS:
        row["predicted"][way] = seconds_of(pieces(size, way, found["tokens"], found["heldout"], pace), rates)
        share = row["predicted"][way] / medians[way]
        said.append(f"{way} {found['tokens'] / medians[way]:9,.0f} (predicted {share:.2f} of its time)")
    step = (medians["distill"] - medians["ridge"]) / pace.steps
    row |= {"tokens_per_second": {name: found["tokens"] / each for name, each in medians.items()}, "step_seconds": step}
    print(
        f"E {job['experts']:>3} F {job['width']:>5} N {job['tokens']:>6}: tokens/s: stock forward "
        f"{found['tokens'] / medians['stock']:9,.0f}, {', '.join(said)}; a step {step * 1e3:,.1f} ms",
        flush=True,
    )
    return row


def peaks(job: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for way in WAYS:
        found = worker("peak", {**job, "way": way})
        rows.append({**{name: job[name] for name in BASE}, "way": way, **found})
        print(
            f"E {job['experts']:>3} F {job['width']:>5} N {job['tokens']:>6} {way:<8} peak "
            f"{found['over_bytes'] / 1e6:8,.0f} MB above what was there, {found['account_bytes'] / 1e6:8,.0f} by the "
            "account",
            flush=True,
        )
    return rows


def show_rates(rates: dict[str, float]) -> None:
    names = {"forward": "forward", "sums": "sums", "solve": "Cholesky", "train": "training steps"}
    print(", ".join(f"{title} {rates[kind] / 1e9:,.1f} GFLOP/s" for kind, title in names.items()), end=", ")
    print(f"Adam {rates['adam'] / 1e6:,.0f} M parameters/s", flush=True)


def projected(rates: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Print and return hours and memory for real configs, 98,304 tokens to heal on and 600 steps as by default."""
    rows = []
    for name in REAL:
        for way in WAYS:
            rank = 1024 if name == "Mixtral-8x7B" else 256
            pace = Pace(rank=rank if way == "low" else None)
            job = {"name": name, "method": WAYS[way][0], "rank": pace.rank}
            found = worker("account", {**job, "threads": 1})
            size = Size(**{**found["size"], "parts": tuple(map(tuple, found["size"]["parts"]))})
            made = pieces(size, way, 98304, HELDOUT, pace)
            row = {"checkpoint": name, "way": way if way != "low" else f"ridge, rank {rank}", **found, "pieces": made}
            row["hours"] = {each: found["layers"] * seconds_of(made, rate) / 3600 for each, rate in rates.items()}
            hours = "; ".join(f"{each} {hour:,.2f} h" for each, hour in row["hours"].items())
            work, held = (found[kind] / 1e9 for kind in ("work", "held"))
            print(
                f"{name:<18} {row['way']:<16} a layer at work {work:6.1f} GB, data and healed tensors {held:6.1f} GB "
                f"(may be files); {hours}",
                flush=True,
            )
            rows.append(row)
    return rows


def worker(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one of ``WORKERS`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", name],
        input=json.dumps(job), capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(job["threads"])},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def pace_of(job: dict[str, Any]) -> Pace:
    """Return the pace of the distillation that is measured: never judged before its end."""
    steps, tokens = job["steps"], 256 if job["quick"] else 2048
    return Pace(steps=steps, tokens_per_step=tokens, judge_every=steps, rank=job["rank"])


def opened(job: dict[str, Any]) -> Any:
    """Return the source, a plan that cuts a quarter of the experts, and the batches to heal on and to judge on."""
    import numpy as np
    import torch

    from moesurgeon.engine.batches import batches_of, rows_for
    from moesurgeon.engine.device import Placement
    from moesurgeon.engine.streams import Source
    from moesurgeon.pipeline.subject import open_subject
    from moesurgeon.surgery.prune import plan_prune
    from moesurgeon.traces.windows import Corpus, Window

    torch.set_num_threads(job["threads"])
    subject, device = open_subject(job["checkpoint"]), torch.device(job["device"])
    source = Source.of_checkpoint(subject.checkpoint, subject.anatomy, Placement(device, torch.float32))
    plan = plan_prune(subject.anatomy, {0: range(job["experts"] * 3 // 4)})
    rng, batches = np.random.default_rng(0), []
    for tokens in (job["tokens"], min(HELDOUT, job["tokens"] // 4)):
        rows = rng.integers(256, size=(tokens // LENGTH or 1, LENGTH)).astype(np.int32)
        windows = [Window("random", number, 0, row) for number, row in enumerate(rows)]
        corpus = Corpus(windows=windows, tokens={"random": rows.size})
        batches.append(list(batches_of(corpus, rows=rows_for(LENGTH), device=device)))
    return source, plan, *batches


def healing(job: dict[str, Any], opened: Any, way: str) -> Callable[[], object]:
    from moesurgeon.engine.streams import Overlay, Stream
    from moesurgeon.engine.walk import Walk
    from moesurgeon.healing.heal import heal

    (source, plan, train, heldout), (method, low) = opened, WAYS[way]
    pace = pace_of(job) if low else replace(pace_of(job), rank=None)

    def work() -> None:
        teacher, student = Stream(source), Stream(source, Overlay(plan=plan))
        walk = Walk([teacher, student], [*train, *heldout])
        numbers = range(len(train)), range(len(train), len(walk.batches))
        heal(walk, student, teacher, *numbers, method=method, pace=pace)

    return work


def work_speed(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from moesurgeon.engine.whole import filled

    given = opened(job)
    _source, _plan, train, heldout = given
    stock_model: Any = filled(opened(job)[0]).base_model

    @torch.no_grad()
    def stock() -> None:
        for batch in train:
            stock_model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)

    sides: dict[str, Callable[[], object]] = {"stock": stock, **{way: healing(job, given, way) for way in WAYS}}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    stock()
    for number in range(job["runs"]):
        for name, side in list(sides.items())[:: 1 if number % 2 else -1]:
            seconds[name].append(timed(side, job))
    tokens, judged = (sum(batch.text_tokens for batch in each) for each in (train, heldout))
    return {"seconds": seconds, "tokens": tokens, "heldout": judged}


def work_peak(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from moesurgeon.engine.streams import Overlay, Stream
    from moesurgeon.engine.walk import Walk
    from moesurgeon.healing.memory import healing_bytes

    given = opened(job)
    source, plan, train, heldout = given
    walk = Walk([Stream(source)], train[:1])
    walk.through()  # the weights are there, and so are the libraries
    del walk
    pace = replace(pace_of(job), steps=2, judge_every=2, rank=pace_of(job).rank if WAYS[job["way"]][1] else None)
    batches = [*train, *heldout]
    account = healing_bytes(Stream(source, Overlay(plan=plan)), WAYS[job["way"]][0], pace, batches)
    hidden = 2 * sum(batch.tokens.numel() for batch in batches) * source.anatomy.hidden * 4
    cuda = job["device"].startswith("cuda")
    before = torch.cuda.memory_allocated() if cuda else status("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    healing({**job, "steps": 2}, given, job["way"])()
    peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
    return {"over_bytes": peak - before, "account_bytes": account.work + account.held + hidden}


def work_rates(job: dict[str, Any]) -> dict[str, float]:
    """Return by kind of piece what is done in a second, the median of some runs."""
    import torch

    from moesurgeon.healing.exact import add_product, exact_device, factor

    torch.set_num_threads(job["threads"])
    device, quick = torch.device(job["device"]), job["quick"]
    high, wide, tokens = (64, 128, 512) if quick else (1024, 2048, 4096)
    inputs, up, down = (
        torch.randn(*shape, device=device) for shape in ((tokens, high), (2 * wide, high), (high, wide))
    )
    up, down = up / high**0.5, down / wide**0.5

    def block(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, rest = torch.nn.functional.linear(inputs, up).chunk(2, dim=-1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * rest, down)

    fed = torch.randn(tokens, wide, device=device)
    gram = torch.zeros(wide, wide, dtype=torch.float64, device=exact_device(device))
    regular = gram + torch.eye(wide, dtype=torch.float64, device=gram.device)
    wanted = torch.randn(wide, high, dtype=torch.float64, device=gram.device)
    masters = [each.clone().requires_grad_() for each in (up, down)]

    def train() -> None:
        block(*masters).square().mean().backward()

    adam = torch.optim.Adam(masters, fused=True)
    train()
    with torch.no_grad():
        sides: dict[str, tuple[float, Callable[[], object]]] = {
            "forward": (6 * tokens * high * wide, lambda: block(up, down)),
            "sums": (2 * tokens * wide * wide, lambda: add_product(gram, factor(fed).T, factor(fed))),
            "solve": (
                wide**3 / 3 + 2 * wide * wide * high,
                lambda: torch.cholesky_solve(wanted, torch.linalg.cholesky_ex(regular)[0]),
            ),
        }
        found = {kind: amount / best_of(side, job) for kind, (amount, side) in sides.items()}
    found["train"] = 18 * tokens * high * wide / best_of(train, job)
    found["adam"] = 3 * high * wide / best_of(adam.step, job)
    return found


def best_of(side: Callable[[], object], job: dict[str, Any]) -> float:
    side()
    return statistics.median(timed(side, job) for _ in range(3 if job["quick"] else 5))


def work_account(job: dict[str, Any]) -> dict[str, Any]:
    """Return what healing takes for a real config, its model built without weights; and what FLOPs follow from."""
    import numpy as np
    import torch

    from moesurgeon.engine.batches import to_batch
    from moesurgeon.engine.destinations import Destinations
    from moesurgeon.engine.device import Placement
    from moesurgeon.engine.skeleton import build_skeleton
    from moesurgeon.engine.streams import Source, Stream
    from moesurgeon.healing.memory import healing_bytes
    from moesurgeon.runtime.cost import count_flops
    from moesurgeon.surgery.anatomy import examine
    from moesurgeon.traces.windows import Window

    config, tensors = REAL[job["name"]]()
    anatomy = examine(config, {spec.name: spec for spec in tensors})
    device = torch.device("cpu")
    skeleton = build_skeleton(anatomy, torch.bfloat16, device)
    source = Source(anatomy, Placement(device, torch.bfloat16), skeleton, Destinations({}, (1, 1)), None)
    window = Window("text", 0, 0, np.zeros(LENGTH, np.int32))
    batches = [to_batch([window], device)] * ((98304 + HELDOUT) // LENGTH)
    takes = healing_bytes(Stream(source), job["method"], Pace(rank=job["rank"]), batches)
    flops, layers = count_flops(anatomy), len(anatomy.moe_layers)
    kept, wide = anatomy.experts, anatomy.expert_width
    parts = [(wide, anatomy.top_k / kept)] * kept
    shared = config.get("n_shared_experts") or 0
    if shared:
        parts.append((shared * wide, 1.0))
    other = (flops.attention + flops.router + flops.dense_mlp) // layers
    size = {"hidden": anatomy.hidden, "top_k": anatomy.top_k, "parts": parts, "other": other}
    return {"work": takes.work, "held": takes.held, "layers": layers, "size": size}


def mixtral() -> tuple[dict[str, Any], list[TensorSpec]]:
    """Mixtral-8x7B with 6 of its 8 experts."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 6, "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = list(_ends(32000, 4096))
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        tensors += _attention(prefix, 4096, 1024)
        tensors.append(_spec(f"{prefix}block_sparse_moe.gate.weight", 6, 4096))
        for expert in range(6):
            names = (f"{prefix}block_sparse_moe.experts.{expert}.{each}.weight" for each in ("w1", "w3", "w2"))
            tensors += _gated(names, 4096, 14336)
    return config, tensors


def deepseek() -> tuple[dict[str, Any], list[TensorSpec]]:
    """DeepSeek-MoE-16B with 48 of its 64 experts."""
    config = {
        "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_routed_experts": 48, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
        "vocab_size": 102400, "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = list(_ends(102400, 2048))
    for layer in range(28):
        prefix = f"model.layers.{layer}."
        tensors += _attention(prefix, 2048, 2048)
        blocks = {"mlp.": 10944} if layer == 0 else {f"mlp.experts.{each}.": 1408 for each in range(48)}
        if layer:
            tensors.append(_spec(f"{prefix}mlp.gate.weight", 48, 2048))
            blocks["mlp.shared_experts."] = 2816
        for block, wide in blocks.items():
            names = (f"{prefix}{block}{each}_proj.weight" for each in ("gate", "up", "down"))
            tensors += _gated(names, 2048, wide)
    return config, tensors


def _spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "BF16", shape)


def _ends(vocabulary: int, high: int) -> list[TensorSpec]:
    ends = ("model.embed_tokens.weight", (vocabulary, high)), ("model.norm.weight", (high,))
    return [_spec(name, *shape) for name, shape in (*ends, ("lm_head.weight", (vocabulary, high)))]


def _attention(prefix: str, high: int, keys: int) -> list[TensorSpec]:
    inner = {"q": (high, high), "k": (keys, high), "v": (keys, high), "o": (high, high)}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": shape for name, shape in inner.items()}
    shapes |= {"input_layernorm": (high,), "post_attention_layernorm": (high,)}
    return [_spec(f"{prefix}{name}.weight", *shape) for name, shape in shapes.items()]


def _gated(names: Any, high: int, wide: int) -> list[TensorSpec]:
    return [_spec(name, *shape) for name, shape in zip(names, ((wide, high), (wide, high), (high, wide)), strict=True)]


def timed(work: Callable[[], object], job: dict[str, Any]) -> float:
    """Return the seconds of ``work``: of the processor where one thread computes, else of the clock."""
    import torch

    on_cpu = job["device"] == "cpu"
    clock = time.process_time if on_cpu and job["threads"] == 1 else time.perf_counter
    started = clock()
    work()
    if not on_cpu:
        torch.accelerator.synchronize()
    return max(1e-9, clock() - started)


def status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(lines[name].split()[0]) * 1024


REAL = {"Mixtral-8x7B": mixtral, "DeepSeek-MoE-16B": deepseek}
WORKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "speed": work_speed,
    "peak": work_peak,
    "rates": work_rates,
    "account": work_account,
}


if __name__ == "__main__":
    main()
