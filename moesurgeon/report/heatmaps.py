"""A profile as a picture: experts by layers.

Legend: L mixture layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesurgeon.checkpoint.whole_file import whole_file
from moesurgeon.errors import UsageError
from moesurgeon.profiling.artefact import Profile
from moesurgeon.profiling.statistics import Array, normalised_entropy, shares

_CELL = 0.11  # inches of an expert and of a layer, where that makes a picture of a fitting size
_WIDTH, _HEIGHT = (7.0, 24.0), (1.6, 7.5)  # inches of a panel: at least, at most
_SPREAD = 3.0  # colours reach from 1/8 to 8 times even use; log2


@dataclass(frozen=True)
class _Panel:
    """``values`` [L, E] and how they are coloured; ``centred``: as multiples of even use, on a scale of powers of 2."""

    title: str
    values: Array
    centred: bool
    unit: str


def check_drawable(path: Path) -> None:
    """Raise UsageError without matplotlib or for another kind of file: before the work, too."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"{path} is neither .png nor .svg; name one of them")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'moesurgeon[plot]'") from error


def draw(profile: Profile, path: Path) -> None:
    """Draw utilisation, gate mass and, where it was measured, latency of every expert to ``path`` (.png or .svg).

    Raises UsageError without matplotlib or for another kind of file, OutputError if it cannot be written.
    """
    check_drawable(path)
    import matplotlib
    from matplotlib.figure import Figure

    panels = _panels(profile)
    layers, experts = panels[0].values.shape
    width, height = (float(np.clip(n * _CELL, *span)) for n, span in ((experts, _WIDTH), (layers, _HEIGHT)))
    size = 9 + (width - _WIDTH[0]) / 4  # points: a wide picture is looked at smaller
    with matplotlib.rc_context({"svg.hashsalt": "moesurgeon", "svg.fonttype": "none", "font.size": size}):
        figure = Figure(figsize=(width + 3.2, (height + 0.95) * len(panels) + 0.5), dpi=150, layout="constrained")
        figure.suptitle(_title(profile), fontsize=size + 2)
        grid = figure.subplots(
            len(panels), 2, squeeze=False, sharey="row", gridspec_kw={"width_ratios": (width, 1.0), "wspace": 0.02}
        )
        for panel, (map_, side) in zip(panels, grid, strict=True):
            _heatmap(figure, map_, panel, profile.statistics.layers)
            _entropy(side, panel)
        kind = path.suffix.lower()
        with whole_file(path, overwrite=True) as part:
            figure.savefig(part, format=kind[1:], metadata={"Date": None} if kind == ".svg" else None)


def _panels(profile: Profile) -> list[_Panel]:
    statistics = profile.statistics
    panels = [_Panel("utilisation: share of the layer's routed tokens", statistics.utilization(), True, "x even use")]
    if not statistics.counts_only:
        mass = shares(statistics.total("weight"))
        panels.append(_Panel("gate mass: share of the layer's gate weights", mass, True, "x even use"))
    if profile.latency:
        sizes = profile.summary()["latency"]["experts"].values()
        known = [set(of) for of in sizes]
        if size := max(set.intersection(*known), key=int, default=None):
            milliseconds = np.array([of[size]["milliseconds"] for of in sizes])
            panels.append(_Panel(f"latency at its mean load in dispatches of {size} tokens", milliseconds, False, "ms"))
    return panels


def _title(profile: Profile) -> str:
    statistics = profile.statistics
    text = ", ".join(statistics.domains[:6]) + (" ..." if len(statistics.domains) > 6 else "")
    return (
        f"{profile.origin.family}: {statistics.experts} experts, top-{statistics.top_k}; "
        f"{int(statistics.seen.sum()):,} tokens of {text}"
    )


def _heatmap(figure: Any, axes: Any, panel: _Panel, layers: tuple[int, ...]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    count, experts = panel.values.shape
    if panel.centred:
        # Never used is not the same as hardly used: it has a colour of its own.
        values = np.log2(panel.values * experts, out=np.full_like(panel.values, np.nan), where=panel.values > 0)
        colours, norm = colormaps["RdBu_r"].with_extremes(bad="black"), Normalize(-_SPREAD, _SPREAD)
    else:
        values, colours, norm = panel.values, colormaps["viridis"], Normalize(0.0, float(panel.values.max()) or 1.0)
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    never = " (black: never)" if panel.centred and np.isnan(values).any() else ""
    axes.set_title(panel.title + never, loc="left", fontsize="medium")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_xticks(_ticks(experts, 32))
    rows = _ticks(count, 20)
    axes.set_yticks(rows, [str(layers[row]) for row in rows])
    bar = figure.colorbar(
        image, ax=axes, pad=0.01, fraction=0.03, aspect=15, extend="both" if panel.centred else "neither"
    )
    bar.set_label(panel.unit)
    if panel.centred:
        steps = np.arange(-int(_SPREAD), int(_SPREAD) + 1)
        bar.set_ticks(steps, labels=[f"1/{2**-step}" if step < 0 else str(2**step) for step in steps])


def _entropy(axes: Any, panel: _Panel) -> None:
    """Draw how even each layer is, beside its row; of milliseconds the largest against the mean."""
    rows = np.arange(len(panel.values))
    if panel.centred:
        axes.barh(rows, normalised_entropy(panel.values), height=0.8, color="0.45")
        axes.set_xlim(0.0, 1.0)
        axes.set_xticks([0.0, 0.5, 1.0], ["0", "½", "1"])
        axes.set_title("entropy", fontsize="medium")
    else:
        axes.barh(rows, panel.values.max(axis=1) / panel.values.mean(axis=1), height=0.8, color="0.45")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title("max/mean", fontsize="medium")
    axes.tick_params(labelleft=False)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def _ticks(count: int, most: int) -> list[int]:
    """Return up to ``most`` numbers from 0 on in round steps.

    >>> _ticks(8, 10), _ticks(256, 10)[:3]
    ([0, 1, 2, 3, 4, 5, 6, 7], [0, 32, 64])
    """
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128, 256, 512, 1024) if count <= step * most)
    return list(range(0, count, step))
