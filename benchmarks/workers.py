"""Parts of a benchmark in processes of their own, so that neither memory nor warm caches pass from one to another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def worker(script: str | Path, name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Let ``script`` do its work ``name`` with ``job`` (``threads`` among it), and return the object that it prints."""
    done = subprocess.run(
        [sys.executable, script, "--worker", name],
        input=json.dumps(job), capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(job["threads"])},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
