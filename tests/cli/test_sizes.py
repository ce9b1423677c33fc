"""``--shard-size`` on the command line, and what a prune says about ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesurgeon.cli.sizes import bytes_of
from moesurgeon.errors import UsageError
from tests.cli.invoke import contents, refused, succeeded

MIXTRAL = "builtin:tiny-mixtral"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5 * 10**9), ("5gb", 5 * 10**9), (" 5 GB ", 5 * 10**9), ("1.5KiB", 1536), ("300", 300), ("7B", 7),
        ("0.29kB", 290), ("2MiB", 2 << 20), ("1TB", 10**12), ("1TiB", 1 << 40), ("0.3GiB", 322122547),
    ],
)  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "5 G B", "-1GB", "5XB", "1e9", "0", "0.1B", "nan", "٣GB", "5GB5", "1_000", "9" * 99, "5K", "+5"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no size|less than a byte"):
        bytes_of(text)


def test_shard_size(tmp_path: Path) -> None:
    report = succeeded("retop", MIXTRAL, tmp_path / "small", "--shard-size", "1MB", "--json").json
    assert report["shards"] > 3
    assert "1 shards" in succeeded("retop", MIXTRAL, tmp_path / "one", "--shard-size", "1TB").out
    assert "model.safetensors" in contents(tmp_path / "one")
    for folder in ("small", "one"):
        assert succeeded("verify", tmp_path / folder, "--source", MIXTRAL, "--json").json["tensors_replaced"] == 0
    refused(2, "retop", MIXTRAL, tmp_path / "out", "--shard-size", "much", says=("'much' is no size", "5GB"))
    assert not (tmp_path / "out").exists()


def test_full_verify(tmp_path: Path) -> None:
    report = succeeded("verify", MIXTRAL, "--full", "--json").json
    assert len(report["hashes"]) == report["tensors"]
    assert f"{report['tensors']} tensors hashed" in succeeded("verify", MIXTRAL, "--full").out


def test_prune_warns_of_ranks(tmp_path: Path) -> None:
    choice = tmp_path / "kept.json"
    layers = succeeded("inspect", MIXTRAL, "--json").json["moe_layers"]
    choice.write_text(json.dumps({str(layer): [0, 1, 2, 3, 4, 5] for layer in layers}))
    prune = ("prune", MIXTRAL, tmp_path / "out", "--keep-experts", choice)
    (warning,) = succeeded(*prune, "--dry-run", "--json").json["warnings"]
    assert "not over 4 (nearest: 4 or 8 experts)" in warning
    assert succeeded(*prune).err == f"note: {warning}\n"
