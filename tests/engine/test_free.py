"""What is free: of control groups of both versions the least, and pages of files count as free."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesurgeon.engine import free
from moesurgeon.engine.free import available_bytes, left_in_groups

STAT = "anon 600\nfile 300\nactive_file 100\ninactive_file 150\n"
OLD_STAT = "cache 300\nactive_file 1\ninactive_file 2\ntotal_active_file 100\ntotal_inactive_file 150\n"


def _group(folder: Path, limit: str, used: int = 900, stat: str = STAT, *, second: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(f"{text.strip()}\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    path = tmp_path / "cgroup"
    path.write_text("0::/user.slice/job\n")
    return path


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    """Files of the kernel's cache are given back; what is in a RAM disk is not."""
    _group(tmp_path / "fs", "1000")
    assert left_in_groups(tmp_path / "none", tmp_path / "fs") == [1000 - 900 + 250]


def test_the_groups_above_count_as_well(tmp_path: Path, membership: Path) -> None:
    mount = tmp_path / "fs"
    _group(mount / "user.slice" / "job", "max")
    _group(mount / "user.slice", "5000")
    _group(mount / "other", "1")
    assert left_in_groups(membership, mount) == [5000 - 900 + 250]
    _group(mount / "user.slice" / "job", "2000")
    assert sorted(left_in_groups(membership, mount)) == [2000 - 900 + 250, 5000 - 900 + 250]


def test_the_first_version(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("11:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/elsewhere\n")
    mount = tmp_path / "fs"
    _group(mount / "memory" / "job", "4000", stat=OLD_STAT, second=False)
    _group(mount / "memory", "9223372036854771712", stat=OLD_STAT, second=False)
    assert min(left_in_groups(membership, mount)) == 4000 - 900 + 250
    _group(mount / "memory" / "job", "500", stat=OLD_STAT, second=False)
    assert min(left_in_groups(membership, mount)) == 0  # over its limit


def test_damaged_files_say_nothing(tmp_path: Path, membership: Path) -> None:
    _group(tmp_path / "fs", "much")
    assert left_in_groups(membership, tmp_path / "fs") == []
    assert left_in_groups(membership, tmp_path / "nowhere") == []


def test_the_least_is_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = available_bytes()
    monkeypatch.setattr(free, "left_in_groups", lambda: [1000, 2000])
    assert whole > 2000 and available_bytes() == 1000
