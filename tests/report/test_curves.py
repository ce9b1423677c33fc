"""Pictures of curves: complete, the same every time, and refused where they cannot be drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import OutputError, UsageError
from moesurgeon.report.curves import check_drawable, draw


def _curves(layers: int, experts: int) -> dict[str, list[dict[str, Any]]]:
    return {
        str(layer): [
            {"experts": count, "error": (experts - count) ** 2 * 1e-3, "kept": list(range(count))}
            for count in range(experts, 1, -1)
        ]
        for layer in range(1, layers + 1)
    }


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_the_same_curves_give_the_same_file(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    for name in "ab":
        draw(_curves(3, 8), "Mixtral", tmp_path / f"{name}.{kind}", 0.05)
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_few_layers_are_named_and_many_are_told_by_colour(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    draw(_curves(3, 8), "Mixtral", tmp_path / "few.svg", 0.05)
    few = (tmp_path / "few.svg").read_text()
    for said in ("Mixtral", "layer 1", "layer 3", "experts that stay"):
        assert said in few
    draw(_curves(40, 64), "DeepSeek-V2", tmp_path / "many.svg", 0.05)
    many = (tmp_path / "many.svg").read_text()
    assert "layer 1<" not in many and ">layer<" in many


def test_other_kinds_and_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"neither \.png, \.svg nor \.pdf"):
        check_drawable(tmp_path / "a.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'moesurgeon\[plot\]'"):
        check_drawable(tmp_path / "a.png")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    with pytest.raises(OutputError, match="choose another place"):
        draw(_curves(2, 4), "Mixtral", tmp_path / "nowhere" / "a.png", 0.05)
