"""On file systems that can share blocks a copy takes no room: whole shards, and what a cut leaves of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.faults.synthetic import hashes

MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}


@pytest.fixture(params=sorted(MAKE))
def sharing_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in a file, where the system and our rights allow."""
    make, image, folder = MAKE[request.param], tmp_path / "image", tmp_path / "disk"
    if shutil.which(make[0]) is None:
        pytest.skip(f"{make[0]} is not installed")
    if os.geteuid():
        pytest.skip("only root may mount a file system")
    with image.open("wb") as file:
        file.truncate(400_000_000)  # XFS takes no less than 300 MB; the holes take no room
    folder.mkdir()
    subprocess.run([*make, image], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"{request.param} cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _free(disk: Path) -> int:
    os.sync()
    return shutil.disk_usage(disk).free


def test_copies_share_blocks(source: Subject, plan: EditPlan, clean: dict[str, str], sharing_disk: Path) -> None:
    own = open_subject(str(shutil.copytree(source.root, sharing_disk / "source")))
    free = _free(sharing_disk)
    assert apply(plan_retop(own.anatomy, RetopSpec(top_k=1)), own.checkpoint, sharing_disk / "top1").linked == 0
    after = _free(sharing_disk)
    assert free - after < 0.1 * own.checkpoint.nbytes
    for name in own.checkpoint.headers:
        assert hashes(sharing_disk / "top1")[name] == hashes(source.root)[name]
    apply(plan, own.checkpoint, sharing_disk / "pruned")
    assert after - _free(sharing_disk) < 0.2 * plan.nbytes  # attention, before the router that shrank, moved
    assert hashes(sharing_disk / "pruned").keys() == clean.keys()
    for name in own.checkpoint.headers:
        assert hashes(sharing_disk / "pruned")[name] == clean[name]
    shutil.rmtree(sharing_disk / "source")
    assert (
        hashes(sharing_disk / "pruned")["model-00003-of-00006.safetensors"] == clean["model-00003-of-00006.safetensors"]
    )
