"""Writing streams: what a prune takes does not depend on the size of the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.many_tensors import make_deepseek
from benchmarks.synthetic import make_checkpoint
from moesurgeon.checkpoint.open import open_checkpoint

MIB = 1 << 20

# VmHWM is the highest that this very process was; reading it again costs nothing while it works.
PEAK = """
import sys
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
start = peak()
from moesurgeon.cli import main
try:
    main()
finally:
    print(start, peak(), file=sys.stderr)
"""


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def _peak(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Return the bytes of memory that a prune takes above the interpreter, and its report."""
    command = [sys.executable, "-c", PEAK, "prune", *map(str, arguments), "--json"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    start, peak = map(int, process.stderr.split())
    return peak - start, json.loads(process.stdout)


@needs_proc
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_pruning_takes_64_mib_whatever_the_size(tmp_path: Path, layout: str) -> None:
    source = make_checkpoint(tmp_path / "source", 300_000_000, layout=layout, shard_bytes=200_000_000)
    layers = open_checkpoint(source).config["num_hidden_layers"]
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({str(layer): [0, 2, 3, 4, 6, 7] for layer in range(layers)}))
    taken, report = _peak(source, tmp_path / "out", "--keep-experts", kept)
    assert report["bytes_after"] > 200_000_000
    assert taken <= 64 * MIB, f"{taken / MIB:.0f} MiB above the interpreter"


@needs_proc
def test_a_tensor_takes_less_than_2_kb(tmp_path: Path) -> None:
    """All that is known of it, in the source, the plan and the result; DeepSeek-V3 has 91,000."""
    found = []
    for layers in (4, 9):
        source = make_deepseek(tmp_path / f"source-{layers}", layers=layers)
        kept = tmp_path / f"kept-{layers}.json"
        kept.write_text(json.dumps({str(layer): [e for e in range(256) if e % 32 < 24] for layer in range(3, layers)}))
        taken, report = _peak(source, tmp_path / f"out-{layers}", "--keep-experts", kept)
        assert report["experts_after"] == 192
        found.append((len(open_checkpoint(source).tensors), taken))
    # What modules take, numpy among them to read routers, does not grow with the tensors: it is in both.
    (fewer, less), (more, most) = found
    assert most - less <= 2000 * (more - fewer), f"{(most - less) / (more - fewer):.0f} bytes per tensor"
    assert most <= 64 * MIB + 2000 * more


REFIT = """
import sys
import torch
from moesurgeon.engine.model import MoeBlock
from moesurgeon.healing.data import BlockData
from moesurgeon.healing.memory import refit_bytes
from moesurgeon.healing.ridge import refitted

method, rank = sys.argv[1], int(sys.argv[2]) or None
high, wide, tokens = 96, 1280, 4096

class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(2, 2 * wide, high) / high**0.5)
        self.down_proj = torch.nn.Parameter(torch.randn(2, high, wide) / wide**0.5)
        self.act_fn = torch.nn.functional.silu

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()
    def forward(self, inputs):
        flat = inputs.flatten(0, 1)
        return self.experts(flat, torch.zeros(len(flat), 1, dtype=torch.long), torch.ones(len(flat), 1))

torch.manual_seed(0)
module = Block().requires_grad_(False)
block = MoeBlock(0, "block", module, module, module.experts, None, "")
def data():
    x = torch.randn(tokens, high)
    first = torch.zeros(tokens, 1, dtype=torch.long)
    return BlockData(x, torch.randn(tokens, high), first, torch.ones(tokens, 1), torch.ones(tokens))
def status(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
sets = data(), data()
small = [one.at(torch.arange(4)) for one in sets]
refitted(block, *small, method=method, rank=1 if rank else None, sweeps=0)
torch.linalg.cholesky(torch.eye(8, dtype=torch.float64))  # libraries are loaded by now
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
refitted(block, *sets, method=method, rank=rank, sweeps=1)
downs = 2 * module.experts.down_proj.numel() * 4
missing = 2 * tokens * high * 4
print(status("VmHWM") - before - downs - missing, refit_bytes(high, wide, rank, method))
"""


@needs_proc
@pytest.mark.parametrize(("method", "rank"), [("ridge", 0), ("ridge", 64), ("scale", 0)])
def test_a_refit_takes_what_the_account_says(method: str, rank: int) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("writes /proc/self/clear_refs")
    command = [sys.executable, "-c", REFIT, method, str(rank)]
    # What is freed is given back, as it is of the sizes that matter; by itself glibc keeps pieces below 32 MiB.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
    taken, said = map(int, process.stdout.split())
    assert said / 2 <= taken <= said + 8 * MIB, f"{taken / MIB:.0f} MiB, {said / MIB:.0f} by the account"
