import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import TraceError
from moesurgeon.traces.files import files_of
from moesurgeon.traces.sources import read_documents
from moesurgeon.traces.spec import TraceSpec, parse_trace


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/two.jsonl", "a/one.txt", "a/deep/three.md", ".hidden/four.txt", "a/.five.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "some words"}\n')
    (tmp_path / "a" / "README.md").write_text("about")
    (tmp_path / "a" / "info.json").write_text("{}")
    return tmp_path


def test_a_folder_is_its_readable_files_in_order(tree: Path) -> None:
    names = [file.relative_to(tree).as_posix() for file in files_of(tree)]
    assert names == ["a/deep/three.md", "a/one.txt", "b/two.jsonl"]
    assert files_of(tree / "b" / "two.jsonl") == [tree / "b" / "two.jsonl"]


def _denied(*_given: Any, **_more: Any) -> Any:
    raise PermissionError(13, "Permission denied", str(_given[0]) if _given else None)


def test_a_sub_folder_that_may_not_be_read_is_not_passed_over(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = os.scandir

    def scandir(path: Any) -> Iterator[Any]:
        return _denied(path) if str(path).endswith("deep") else stock(path)  # type: ignore[no-any-return]

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(TraceError, match=r"a/deep cannot be read \(permission denied\): change its permissions"):
        files_of(tree)


def test_a_folder_that_may_not_be_looked_into_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", _denied)
    with pytest.raises(TraceError, match=r"cannot be looked at \(permission denied\)") as caught:
        parse_trace(f"code={tree}/b")
    assert "\n" not in str(caught.value)
    with pytest.raises(TraceError, match=r"b cannot be read \(permission denied\)"):
        files_of(tree / "b")


def test_a_file_that_may_not_be_read_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Path.open

    def opened(self: Path, *given: Any, **more: Any) -> Any:
        return _denied(self) if self.name == "one.txt" else stock(self, *given, **more)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(TraceError, match=r"one.txt, after line 0: permission denied: make the file readable"):
        list(read_documents(TraceSpec(domain="d", location=str(tree)), "all"))
