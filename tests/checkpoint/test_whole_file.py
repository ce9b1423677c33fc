"""A file appears whole or not at all, and no other is replaced unasked."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moesurgeon.checkpoint import whole_file as module
from moesurgeon.checkpoint.whole_file import refuse_file, whole_file, write_whole
from moesurgeon.errors import OutputError, UsageError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_there_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path, overwrite=False) as part:
        part.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and _names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_a_failure_leaves_what_was_there(error: type[BaseException] | OSError, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    expected = OutputError if isinstance(error, OSError) else error
    with pytest.raises(expected), whole_file(tmp_path / "file", overwrite=True) as part:
        part.write_text("half")
        raise error
    with pytest.raises(expected), whole_file(tmp_path / "a" / "b", overwrite=True, makes_folders=True):
        raise error
    assert _names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_came_up_meanwhile_stays(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"

    def refuse(*_names: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not has_links:
        monkeypatch.setattr(module.os, "link", refuse)
    with pytest.raises(UsageError, match="came up meanwhile"), whole_file(path, overwrite=False) as part:
        part.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and _names(tmp_path) == ["file"]
    with whole_file(tmp_path / "other", overwrite=False) as part:
        part.write_text("mine")
    assert _names(tmp_path) == ["file", "other"]


def test_two_writers(tmp_path: Path) -> None:
    with whole_file(tmp_path / "file", overwrite=True) as part:
        with (
            pytest.raises(OutputError, match="another moesurgeon is writing"),
            whole_file(tmp_path / "file", overwrite=True),
        ):
            pytest.fail("it began")
        part.write_text("first")
    assert (tmp_path / "file").read_text() == "first" and _names(tmp_path) == ["file"]


def test_a_folder_is_not_made_unasked(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"), whole_file(tmp_path / "a" / "file", overwrite=True):
        pytest.fail("it began")
    assert _names(tmp_path) == []


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    write_whole(tmp_path / "file", "old")
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "file", "new")
    assert _names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, overwrite, says in (
        (tmp_path, True, "is not a file"),
        (tmp_path / "file", False, "exists; name another file or add --overwrite"),
        (tmp_path / "dangling", True, "is not a file"),
        (tmp_path / "circle", True, "is not a file"),
        (tmp_path / "a" / "x", True, "there is no folder"),
        (tmp_path / "file" / "x", True, "is a file"),
    ):
        with pytest.raises(UsageError, match=rf"--log .*{says}"):
            refuse_file(path, "--log", overwrite=overwrite)
    for name in ("x" * 300, "x" * 252):  # the second is too long with what stands before it while it is written
        with pytest.raises(OutputError, match=os.strerror(errno.ENAMETOOLONG)):
            refuse_file(tmp_path / name, "--log", overwrite=True)
    refuse_file(tmp_path / "file", "--log", overwrite=True)
    refuse_file(tmp_path / "a" / "x", "--log", overwrite=False, makes_folders=True)


def test_a_file_of_a_checkpoint_stays(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"config.json is a file of the checkpoint"):
        refuse_file(tmp_path / "config.json", "--csv", overwrite=True)
    refuse_file(tmp_path / "new.csv", "--csv", overwrite=True)
