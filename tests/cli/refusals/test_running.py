"""Text, machines and models that cannot be run, for every command that runs one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.broken import SHARD, whole
from tests.cli.conftest import TEXT
from tests.cli.invoke import moesurgeon, one_line, refused
from tests.cli.refusals.places import INPUT, MIXTRAL, RUNNING, USAGE, running


@running
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", "", ("holds no text", "give another trace")),
        ("empty.txt", "", ("holds no text", "give another trace")),
        ("blank.jsonl", '{"text": " "}\n\n', ("holds no text", "give another trace")),
        ("bad.jsonl", '{"text": "fine"}\n{"text": \n', ("line 2: not JSON", "one object per line")),
        ("list.jsonl", "[1, 2]\n", ("line 1: list where an object", "one object per line")),
        ("column.jsonl", '{"body": "x"}\n', ("no column text", "PATH:COLUMN")),
        ("number.jsonl", '{"text": 5}\n', ("line 1: int", "PATH:COLUMN")),
        ("latin1.txt", b"caf\xe9 " * 50, ("not UTF-8", "iconv")),
        ("broken.jsonl.gz", b"no gzip", ("cannot be read", "again")),
        ("broken.parquet", b"no parquet", ("cannot be read", "again")),
        ("notes.docx", "x", ("not a kind of file", "give a")),
    ],
)
def test_bad_trace(
    command: str, name: str, content: str | bytes, says: tuple[str, ...], out: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    says = says if command != "recover" or "holds no text" not in says else says[:1]
    refused(INPUT, *RUNNING[command](out), "-t", tmp_path / name, says=says)


@running
def test_trace_arguments(command: str, out: Path, tmp_path: Path) -> None:
    arguments = RUNNING[command](out)
    refused(INPUT, *arguments, "-t", tmp_path / "nowhere.jsonl", says=("no such file", "builtin:all"))
    refused(INPUT, *arguments, "-t", tmp_path / "written", says=("without traces", "give"))
    refused(USAGE, *arguments, "-t", "builtin:klingon", says=("'klingon'", "python"))
    refused(USAGE, *arguments, "-t", "builtin:json", "-t", "builtin:json", says=("two traces", "NAME="))
    refused(USAGE, *arguments, "-t", "builtin:all", "--max-tokens", "9", says=("too few for 6 traces", "at least 48"))
    refused(USAGE, *arguments, "-t", "builtin:all", "--max-tokens", "0", says=("--max-tokens",))
    refused(USAGE, *arguments, "-t", "builtin:json", "--split", "holdout", says=("--split", "holdout"))


@running
def test_machine_arguments(command: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*RUNNING[command](out), *TEXT]
    if not torch.cuda.is_available():
        refused(USAGE, *arguments, "--device", "cuda", says=("--device cuda cannot be used here", ": "))
    refused(USAGE, *arguments, "--device", "abacus", says=("--device abacus cannot be used here",))
    refused(USAGE, *arguments, "--device", "meta", says=("--device meta cannot be used here",))
    refused(USAGE, *arguments, "--device", "", says=("--device",))
    refused(USAGE, *arguments, "--dtype", "int4", says=("--dtype int4 is not one of", "bfloat16"))
    refused(USAGE, *arguments, "--length", "4096", says=("--length 4096", "context of 512"))
    refused(USAGE, *arguments, "--length", "7", says=("--length",))


@running
def test_tokenizer_of_another_model(command: str, out: Path, tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(
        {"id": 2048, "content": " = ", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False}
    )  # fmt: skip
    path.write_text(json.dumps(tokenizer))
    arguments = [source if part == MIXTRAL else part for part in RUNNING[command](out)]
    refused(INPUT, *arguments, *TEXT, says=("token 2048", "copy the"))
    path.write_text("{}")
    refused(INPUT, *arguments, *TEXT, says=("tokenizer.json: damaged", "copy it from"))
    path.unlink()
    refused(INPUT, *arguments, *TEXT, says=("no tokenizer", "copy tokenizer.json"))


@running
@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "sigh"}, {"num_attention_heads": 0}, {"num_attention_heads": 3}, {"vocab_size": "big"},
     {"vocab_size": 4096}, {"rope_theta": "fast"}],
    ids=str,
)  # fmt: skip
def test_config_that_only_the_model_reads(command: str, changes: dict[str, object], out: Path, tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    outcome = moesurgeon(*[source if part == MIXTRAL else part for part in RUNNING[command](out)], *TEXT)
    one_line(outcome, INPUT, "config.json" if changes != {"vocab_size": "big"} else "vocab_size")


@running
def test_weights_that_are_no_numbers(command: str, out: Path, tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    shard = source / SHARD
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    with shard.open("r+b") as file:
        file.seek(8 + header)
        file.write(b"\xff\xff" * 1000)  # NaN in bfloat16
    arguments = [source if part == MIXTRAL else part for part in RUNNING[command](out)]
    few = ("--heldout-tokens", "64") if command == "recover" else ()
    refused(INPUT, *arguments, *TEXT, *few, says=("not", "NaN"))
