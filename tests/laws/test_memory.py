"""Writing streams: what a prune takes does not depend on the size of the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_pruning_takes_64_mib_whatever_the_size(tmp_path: Path, layout: str) -> None:
    source = make_checkpoint(tmp_path / "source", 300_000_000, layout=layout, shard_bytes=200_000_000)
    layers = open_checkpoint(source).config["num_hidden_layers"]
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({str(layer): [0, 2, 3, 4, 6, 7] for layer in range(layers)}))
    process = subprocess.run(
        [sys.executable, "-c", PEAK, "prune", source, tmp_path / "out", "--keep-experts", kept, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    start, peak = map(int, process.stderr.split())
    assert json.loads(process.stdout)["bytes_after"] > 200_000_000
    assert peak - start <= 64 * MIB, f"{(peak - start) / MIB:.0f} MiB above the interpreter"
