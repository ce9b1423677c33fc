"""A hostile folder is refused, or looked at, within 1 GiB of address space; a prune within 64 MiB of memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.synthetic import Geometry, make_checkpoint
from moesurgeon.checkpoint.header import MAX_HEADER_BYTES
from moesurgeon.checkpoint.open import CONFIG_NAME, INDEX_NAME, PROVENANCE_NAME

SMALL = Geometry(hidden=16, width=16, experts=4, vocabulary=32)
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from moesurgeon.cli import main
main()
"""
NESTED = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def _repeated(piece: bytes, size: int) -> bytes:
    """A JSON object of ``size`` bytes that holds a list of ``piece`` over and over."""
    return b'{"a":[' + b",".join([piece] * (size // (len(piece) + 1))) + b"]}"


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def _header(text: bytes, length: int | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _shard(folder).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)

    return make


def _repeated_header(piece: bytes, size: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _header(_repeated(piece, size))(folder)

    return make


def _file(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content()) and None


def _sparse(length: int) -> Callable[[Path], None]:
    """A header that claims ``length`` bytes in a file that has them, all zero."""

    def make(folder: Path) -> None:
        with _shard(folder).open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(8 + length)

    return make


def _large_config(folder: Path) -> None:
    with (folder / CONFIG_NAME).open("wb") as file:
        file.write(_repeated(b"[[[]]]", 20_000_000))
        file.truncate(200_000_000)


def _shape(*sizes: int) -> Callable[[Path], None]:
    entry = {"dtype": "F32", "shape": sizes, "data_offsets": [0, 4]}
    return _header(json.dumps({"model.layers.0.block_sparse_moe.experts.0.w1.weight": entry}).encode() + bytes(4))


def _million_entries() -> bytes:
    places = (f'"model.layers.0.experts.{number}.weight":"model-00001.safetensors"' for number in range(1_000_000))
    return b'{"weight_map":{' + ",".join(places).encode() + b"}}"


HOSTILE: dict[str, Callable[[Path], None]] = {
    "header-of-2^63": _header(b"{}", 2**63),
    "header-of-zeros": _sparse(MAX_HEADER_BYTES),
    "header-over-the-limit": _sparse(MAX_HEADER_BYTES + 1),
    "header-of-lists": _repeated_header(b"[]", 60_000_000),
    "header-of-objects": _repeated_header(b'{"":0}', 60_000_000),
    "header-nested": _header(NESTED),
    "shape-overflows": _shape(2**62, 2**62, 4),
    "shape-times-zero": _shape(2**62, 0, 2**62),
    "config-of-200-mb": _large_config,
    "config-of-lists-below-the-limit": _file(CONFIG_NAME, lambda: _repeated(b"[]", 15_900_000)),
    "config-nested": _file(CONFIG_NAME, lambda: NESTED),
    "config-nested-900": _file(CONFIG_NAME, lambda: b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "index-of-a-million": _file(INDEX_NAME, _million_entries),
    "index-of-lists": _file(INDEX_NAME, lambda: _repeated(b"[]", 60_000_000)),
    "index-of-objects-below-the-limit": _file(INDEX_NAME, lambda: _repeated(b'{"":0}', 13_900_000)),
    "index-of-wide-text": _file(
        INDEX_NAME, lambda: b'{"a":"' + "\U0001f999".encode() + b"x" * 60_000_000 + b'"}'
    ),
    "numbers-of-a-million-digits": _file(CONFIG_NAME, lambda: b'{"num_local_experts":' + b"9" * 1_000_000 + b"}"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_fits_into_a_gigabyte(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", 20_000, shard_bytes=15_000, geometry=SMALL)
    HOSTILE[name](folder)
    _refused("inspect", folder)


def test_a_hostile_record_fits_into_a_gigabyte(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", 20_000, shard_bytes=15_000, geometry=SMALL)
    (folder / PROVENANCE_NAME).write_bytes(_repeated(b"[]", 60_000_000))
    _refused("verify", folder)


def _refused(command: str, folder: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, command, folder],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "1000"},
    )
    assert process.returncode == 3, process.stderr[-2000:]
    assert process.stderr.count("\n") == 1
    for path in folder.iterdir():
        path.unlink()  # some are large
