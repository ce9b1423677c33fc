"""The pictures: of the right size, the same every time, and refused where they cannot be drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from moesurgeon.errors import OutputError, UsageError
from moesurgeon.profiling.artefact import Profile
from moesurgeon.profiling.statistics import Statistics
from moesurgeon.report.heatmaps import draw
from tests.profiling.made import profile_of

LATENCY = {
    "device": "cpu", "dtype": "float32", "tokens": [1, 64], "p50": [0.1, 0.2], "p95": [0.1, 0.2], "p99": [0.1, 0.2],
    "knots": [[1, 0.1], [64, 0.2]], "block": {},
}  # fmt: skip


def _profile(layers: int, experts: int, *, measured: bool = True) -> Profile:
    random = np.random.default_rng(0)
    statistics = Statistics.empty(("text",), tuple(range(1, layers + 1)), experts, 2)
    tokens = random.multinomial(20_000, random.dirichlet(np.ones(experts)), size=layers).astype(float)
    tokens[0, 3] = 0.0
    statistics.sums["tokens"][0, 0] = tokens
    statistics.sums["seen"][0, 0] = 10_000
    if measured:
        statistics.sums["weight"][0, 0] = tokens * 0.5
        statistics.sums["dispatch"][:, 0] = 10.0, 300.0, 5000.0, 4000.0
    profile = profile_of(statistics)
    return Profile(profile.statistics, profile.origin, latency=LATENCY if measured else None)


def test_an_svg_shows_what_there_is_and_is_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    draw(_profile(4, 8), tmp_path / "a.svg")
    draw(_profile(4, 8), tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for said in ("utilisation", "gate mass", "latency", "black: never", "8 experts, top-2", "10,000 tokens"):
        assert said in text
    draw(_profile(4, 8, measured=False), tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    assert "utilisation" in text and "gate mass" not in text and "latency" not in text


@pytest.mark.parametrize(("layers", "experts", "pixels"), [(28, 64, 10), (58, 256, 10), (4, 8, 20)])
def test_cells_are_large_enough_to_be_seen(layers: int, experts: int, pixels: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    draw(_profile(layers, experts), tmp_path / "a.png")
    header = (tmp_path / "a.png").read_bytes()[:24]
    width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
    assert width > experts * pixels and height > 3 * layers * pixels
    assert width < 6000 and height < 6000


def test_other_kinds_and_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"neither .png nor .svg"):
        draw(_profile(2, 4), tmp_path / "a.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'moesurgeon\[plot\]'"):
        draw(_profile(2, 4), tmp_path / "a.png")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    with pytest.raises(OutputError, match="choose another place"):
        draw(_profile(2, 4), tmp_path / "nowhere" / "a.png")
