"""What distilling a block costs in bfloat16 on a CPU, with each expert's tokens rounded up to few sizes and without.

    OMP_NUM_THREADS=1 python benchmarks/heal_bfloat16.py [--hidden 1024] [--width 3584] [--experts 8] [--steps 12]

One Mixtral block with random weights, trained by ``healing.distil`` in turns in float32, in bfloat16 with kernels for
every number of rows (as it was, ``ROWS`` 1) and in bfloat16 as it is. The kernels of 20 steps are made before anything
is timed, since a real distillation has hundreds. Prints seconds a step and ratios to float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as `python benchmarks/heal_bfloat16.py`

from moesurgeon.engine.model import MoeBlock  # noqa: E402 - after its path
from moesurgeon.healing import block as blocks  # noqa: E402
from moesurgeon.healing.data import BlockData  # noqa: E402
from moesurgeon.healing.distil import distilled  # noqa: E402
from moesurgeon.healing.pace import Pace  # noqa: E402

WAYS = {"float32": (torch.float32, 64), "bfloat16, as it was": (torch.bfloat16, 1), "bfloat16": (torch.bfloat16, 64)}
TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="in a turn")
    parser.add_argument("--warm", type=int, default=20, help="steps before")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runs = {name: prepared(dtype, given) for name, (dtype, _rows) in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(given.turns + 1):
        for name, (_dtype, rows) in WAYS.items():
            blocks.ROWS = rows
            steps = given.steps if turn else given.warm
            started = time.perf_counter()
            runs[name](steps, turn)
            if turn:
                seconds[name].append((time.perf_counter() - started) / steps)
    base = statistics.median(seconds["float32"])
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(f"{name:<20} {middle:.3f} s a step ({min(each):.3f} to {max(each):.3f})  {middle / base:.2f} x float32")
    print(json.dumps({"options": vars(given), "seconds": seconds}))


def prepared(dtype: torch.dtype, given: argparse.Namespace) -> Callable[[int, int], None]:
    """Return what trains a block in ``dtype`` for so many steps, with a seed."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=given.hidden, intermediate_size=given.width, num_local_experts=given.experts,
        num_experts_per_tok=given.top_k,
    )  # fmt: skip
    config._experts_implementation = "eager"
    module = MixtralSparseMoeBlock(config).to(dtype)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    block = MoeBlock(0, "block", module, module.gate, module.experts, None, "")

    def data(tokens: int) -> BlockData:
        inputs, target = torch.randn(tokens, given.hidden).to(dtype), torch.randn(tokens, given.hidden).to(dtype)
        shape = (tokens, given.top_k)
        return BlockData(inputs, target, torch.zeros(shape), torch.zeros(shape), torch.ones(tokens))

    train, heldout = data(TOKENS), data(64)

    def run(steps: int, seed: int) -> None:
        pace = Pace(steps=steps, judge_every=steps, seed=seed)
        distilled(block, {}, train, heldout, pace, lambda _done: None)

    return run


if __name__ == "__main__":
    main()
