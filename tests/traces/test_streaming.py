"""Traces larger than memory: reading one takes what its budget needs, whatever it weighs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

MEGABYTES = 208
ROW = 26_000  # characters; 8000 rows


def _text(number: int) -> str:
    return (f"document {number} says the same words again and again " * (1 + ROW // 40))[:ROW]


def _jsonl(folder: Path) -> Path:
    with (folder / "large.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": _text(number)}) + "\n" for number in range(MEGABYTES * 10**6 // ROW))
    return folder / "large.jsonl"


def _jsonl_gz(folder: Path) -> Path:
    with gzip.open(folder / "large.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": _text(number)}) + "\n" for number in range(MEGABYTES * 10**6 // ROW))
    return folder / "large.jsonl.gz"


def _table(rows: int) -> pa.Table:
    return pa.table({"text": [_text(number) for number in range(rows)], "other": ["x" * 1000] * rows})


def _parquet(folder: Path) -> Path:
    """One row group of everything, without dictionary: 200 MB in a single column chunk."""
    pq.write_table(
        _table(MEGABYTES * 10**6 // ROW), folder / "large.parquet", row_group_size=1 << 20, use_dictionary=False,
        compression=None,
    )  # fmt: skip
    return folder / "large.parquet"


def _saved(folder: Path) -> Path:
    datasets.Dataset(_table(MEGABYTES * 10**6 // ROW)).save_to_disk(folder / "saved")
    return folder / "saved"


READ = """
import re, sys
from pathlib import Path
import pyarrow.parquet, datasets
from moesurgeon.traces.spec import parse_traces
from moesurgeon.traces.tokenizer import load_tokenizer
from moesurgeon.traces.windows import load_corpus
path, sample = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None
tokenize = load_tokenizer(Path(path).parent)

def read(max_tokens):
    return load_corpus(parse_traces(["d=" + path]), tokenize, splits=["all"], length=512, max_tokens=max_tokens,
                       sample=sample)

def anonymous():  # not the pages of a mapped file, which the system takes back as it likes
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

import threading, time
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch); watcher.start()
corpus = read(20_000)
done.set(); watcher.join()
assert corpus.tokens == {"d": 20_000}, corpus.tokens
print(max(peak, anonymous()) - before)
"""


@pytest.mark.parametrize("sample", [(), ("5",)], ids=["first", "sample"])
@pytest.mark.parametrize("write", [_jsonl, _jsonl_gz, _parquet, _saved])
def test_a_small_budget_of_a_large_trace_takes_little_memory(
    write: Callable[[Path], Path], sample: tuple[str, ...], tmp_path: Path
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "words": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path)
    command = [sys.executable, "-c", READ, str(path), *sample]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    print(f"{path.name}: {int(result.stdout) / 1e6:.0f} MB")
    assert int(result.stdout) < 100e6, f"{int(result.stdout) / 1e6:.0f} MB for a budget of 20,000 tokens"


def test_of_a_document_that_is_far_longer_than_the_budget_only_the_beginning_is_tokenised(tmp_path: Path) -> None:
    from moesurgeon.traces.documents import Document
    from moesurgeon.traces.windows import take_windows

    longest = 0

    def words(texts: list[str]) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return [list(range(len(text.split()))) for text in texts]

    windows = take_windows([Document("a", "word " * 10**6)], "d", words, length=64, max_tokens=100)
    assert [len(window.tokens) for window in windows] == [64, 36]
    assert longest < 20_000
    # Words of a thousand letters: the beginning was too short, so all of it is.
    windows = take_windows([Document("a", ("w" * 1000 + " ") * 500)], "d", words, length=64, max_tokens=100)
    assert [len(window.tokens) for window in windows] == [64, 36]
