"""Memory budgets: what a run takes against what was estimated, and how long it takes, with one budget after another.

    python benchmarks/memory.py [--bytes 2.5GB] [--tokens 8192] [--folder /tmp] [--only PART]

Each run is a command in a process of its own: without a limit, with limits between, and with the least that a refusal
asks for. (profile, evaluate) a synthetic Mixtral in float32, twice as large as it is stored. (heal) a smaller one, a
cut to top-1 distilled for a few steps a layer. (tiny) both builtin checkpoints. Before each process the checkpoint's
pages are dropped from the cache, so that reading is reading.

The peak is the process's, sampled 50 times a second: its own memory and the libraries it maps. Pages of mapped files
that hold hidden states are not in it: the kernel takes them back. Prints a table and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as `python benchmarks/memory.py`

from benchmarks.synthetic import Geometry, bytes_from, make_checkpoint
from benchmarks.walk import drop_from_cache

PARTS = ("profile", "evaluate", "heal", "tiny")
LIMITS = {
    "profile": ("3GB", "2GB", "1.6GB", "1.4GB", "1.2GB"),
    "evaluate": ("3GB", "2GB", "1.6GB", "1.4GB", "1.2GB"),
    "heal": ("2GB", "1.5GB", "1.2GB"),
    "tiny": ("700MB", "620MB"),
}
TEXT = ("-t", "builtin:all", "--length", "512", "--device", "cpu", "--dtype", "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=bytes_from, default="2.5GB", help="of the large checkpoint as it is stored")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--only", choices=PARTS, action="append", help="leave the other parts out")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="moesurgeon-memory-", dir=arguments.folder) as scratch:
        work, made = Path(scratch), {}
        for part in arguments.only or PARTS:
            large = part in ("profile", "evaluate")
            if large and "large" not in made:
                made["large"] = _readable(work / "large", arguments.bytes, Geometry())
            if part == "heal":
                made["small"] = _readable(
                    work / "small", 300_000_000, Geometry(hidden=512, width=1792, vocabulary=8000)
                )
            sources = [made["large" if large else "small"]] if part != "tiny" else ["tiny-mixtral", "tiny-deepseek"]
            for source in sources:
                name = part if part != "tiny" else f"evaluate {source}"
                figures[name] = measured(part, source, work, arguments.tokens)
                shown(name, figures[name])
    print(json.dumps(figures))


def measured(part: str, source: Path | str, work: Path, tokens: int) -> list[dict[str, Any]]:
    """Return a row for each budget; the first has none."""
    command = _command(part, source, work / "out", tokens)
    refused = _run([*command, "--max-memory", "100MB"], source, work)
    least = re.search(r"give at least ([\d.]+[GM]B)", refused["said"])
    assert least, refused["said"]
    rows = [{"budget": limit, **_run([*command, *_limited(limit)], source, work)} for limit in (None, *LIMITS[part])]
    rows.append({"budget": f"{least[1]} (the least)", **_run([*command, *_limited(least[1])], source, work)})
    libraries = rows[0].pop("files")
    for row in rows:
        row.pop("files", None)
        row["peak"] = row.pop("own") + libraries
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    return rows


def shown(name: str, rows: Sequence[dict[str, Any]]) -> None:
    head = ("budget", "batch", "logits", "ahead", "files", "estimate", "peak, MB", "tokens/s", "time")
    print(f"\n{name}\n{head[0]:<20} {' '.join(f'{each:>9}' for each in head[1:])}")
    for row in rows:
        memory = row["memory"]
        if memory is None:
            print(f"{row['budget']:<20} {row['said'][:90]}")
            continue
        estimate = (memory["estimate"] + (512 << 20)) / 1e6  # beside the interpreter
        cells = (
            f"{memory['batch_tokens']:,}", f"{memory['logit_positions']:,}", "yes" if memory["read_ahead"] else "no",
            "yes" if memory["hidden_in_files"] else "no", f"{estimate:,.0f}", f"{row['peak'] / 1e6:,.0f}",
            f"{row['tokens'] / row['seconds']:,.0f}", f"{row['ratio']:.2f}",
        )  # fmt: skip
        print(f"{row['budget'] or 'none':<20} {' '.join(f'{each:>9}' for each in cells)}")


def _command(part: str, source: Path | str, out: Path, tokens: int) -> list[str]:
    name = str(source) if isinstance(source, Path) else f"builtin:{source}"
    text = [*TEXT, "--max-tokens", str(tokens)]
    if part == "profile":
        return ["profile", name, "-o", str(out), "--no-resume", *text]
    if part in ("evaluate", "tiny"):
        return ["evaluate", name, *(("--against", name) if part == "tiny" else ()), *text]
    heal = ["--calibrate", "builtin:all", "--heal-tokens", str(tokens), "--heal-heldout", "2048", "--heal-steps", "4"]
    return ["retop", name, str(out), *heal, "--allow-noop", "--device", "cpu", "--dtype", "float32"]


def _limited(limit: str | None) -> list[str]:
    return [] if limit is None else ["--max-memory", limit]


def _run(arguments: Sequence[str], source: Path | str, work: Path) -> dict[str, Any]:
    """Run a command; return its report's memory, its most memory by kind, its seconds and what it said."""
    if isinstance(source, Path):
        drop_from_cache(source)
    shutil.rmtree(work / "out", ignore_errors=True)
    started = time.perf_counter()
    command = [sys.executable, "-m", "moesurgeon", *arguments, "--json"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        running = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "TMPDIR": str(work)})
        own = files = 0
        while running.poll() is None:
            status = _status(running.pid)
            own, files = max(own, status.get("RssAnon", 0)), max(files, status.get("RssFile", 0))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        text, said = out.read(), err.read().strip()
    report = json.loads(text) if text.startswith("{") else {}
    healed = report.get("healed", {})
    return {
        "memory": report.get("memory") or healed.get("memory"),
        "tokens": report.get("tokens") or healed.get("tokens") or 0,
        "own": own,
        "files": files,
        "seconds": seconds,
        "said": said or report.get("error", {}).get("message", "") if report.get("error") or said else "",
    }


def _status(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return {}
    pairs = dict(line.split(":", 1) for line in lines)
    return {key: int(pairs[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile") if key in pairs}


def _readable(folder: Path, nbytes: int, geometry: Geometry) -> Path:
    """Make a checkpoint of random weights with the tokenizer of a tiny one, to have text for it."""
    from moesurgeon.pipeline.subject import open_subject

    make_checkpoint(folder, nbytes, geometry=geometry)
    for path in open_subject("builtin:tiny-mixtral").root.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


if __name__ == "__main__":
    main()
