"""Whose file an error of the system is about, and which exit code that makes."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from moesurgeon.checkpoint.faults import explained, is_below, safetensors_errors
from moesurgeon.errors import InputError, OutputError

OUT, LOG = Path("/data/out"), Path("/logs/a.csv")


@pytest.mark.parametrize(
    ("number", "path", "kind"),
    [
        (errno.EACCES, "/data/in/config.json", InputError),
        (errno.ENAMETOOLONG, "/data/" + "x" * 300, InputError),
        (errno.ELOOP, "/data/outside", InputError),
        (errno.EIO, b"/data/in/shard", InputError),
        (errno.EACCES, "/data/out", OutputError),
        (errno.EACCES, "/data/out/config.json", OutputError),
        (errno.EROFS, "/data/.out.moesurgeon/x", OutputError),
        (errno.EACCES, "/data/.out.walk", OutputError),
        (errno.EACCES, "/logs/a.csv", OutputError),
        (errno.EACCES, "/logs/.a.csv.part", OutputError),
        (errno.ENOSPC, "/tmp/states.hidden", OutputError),  # wherever it was
        (errno.EDQUOT, None, OutputError),
        (errno.ENOENT, f"{sys.prefix}/lib/package/data.json", type(None)),
        (errno.ENOENT, str(Path(explained.__code__.co_filename)), type(None)),
        (errno.EBADF, None, type(None)),
        (errno.EACCES, 5, type(None)),  # a descriptor
    ],
)
def test_an_error_is_about_an_input_or_an_output(number: int, path: str | bytes | int | None, kind: type) -> None:
    found = explained(OSError(number, os.strerror(number), path), (OUT, LOG))
    assert type(found) is kind
    if found is not None:
        assert os.strerror(number) in str(found) and "; " in str(found)
        assert path is None or os.fsdecode(path) in str(found)  # type: ignore[arg-type]


def test_no_folder_for_temporary_files() -> None:
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert isinstance(explained(error, ()), OutputError)


def test_beside_is_below() -> None:
    assert is_below(Path("/a/b/c"), Path("/a/b")) and is_below(Path("/a/.b.stages/x/y"), Path("/a/b"))
    assert not is_below(Path("/a/bc"), Path("/a/b")) and not is_below(Path("/a/.bc.x"), Path("/a/b"))


def test_safetensors_says_what_the_disk_said(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "file"
    with pytest.raises(OSError, match="nowhere") as caught, safetensors_errors(path):
        save_file({"a": np.zeros(1)}, path)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(SafetensorError), safetensors_errors(path):
        raise SafetensorError("something else")
