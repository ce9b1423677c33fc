from __future__ import annotations

from pathlib import Path

import pytest

from moesurgeon.pipeline import journal


def test_a_line_that_a_kill_left_unfinished_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / journal.NAME
    assert journal.entries(path) == []
    journal.append(path, {"a": 1})
    journal.append(path, {"b": 2})
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        before = [{"a": 1}][: int(end >= len(whole) // 2)]
        assert journal.entries(path) == before
        journal.append(path, {"c": 3})
        assert journal.entries(path) == [*before, {"c": 3}]


def test_what_is_no_journal_is_told(tmp_path: Path) -> None:
    path = tmp_path / journal.NAME
    for content in (b"{\n", b"[1]\n", b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r".+"):
            journal.entries(path)
