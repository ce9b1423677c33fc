"""Writing streams: what a prune takes does not depend on the size of the checkpoint."""

from __future__ import annotations

import json
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
    source = make_deepseek(tmp_path / "source", layers=9)
    tensors = len(open_checkpoint(source).tensors)
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({str(layer): [e for e in range(256) if e % 32 < 24] for layer in range(3, 9)}))
    taken, report = _peak(source, tmp_path / "out", "--keep-experts", kept)
    assert report["experts_after"] == 192
    assert taken <= 32 * MIB + 2000 * tensors, f"{(taken - 32 * MIB) / tensors:.0f} bytes per tensor"
