"""Curves of error against count as a picture: a line for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.whole_file import whole_file
from moesurgeon.errors import UsageError

_KINDS = (".png", ".svg", ".pdf")
_NAMED = 12  # layers that the legend tells apart; of more a bar of colours does
_LEAST = 1e-4  # of |y|^2: what is under that is drawn at the lower edge


def check_drawable(path: Path) -> None:
    """Raise UsageError without matplotlib or for another kind of file: before the work, too."""
    if path.suffix.lower() not in _KINDS:
        raise UsageError(f"{path} is neither {', '.join(_KINDS[:-1])} nor {_KINDS[-1]}; name one of them")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--curve-plot needs matplotlib, which is not installed: pip install 'moesurgeon[plot]'"
        ) from error


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], title: str, path: Path, small: float) -> None:
    """Draw ``curves``, by layer the points of ``selection.curves``, to ``path``; a line at what is called ``small``.

    Raises what :func:`check_drawable` does, and OutputError if it cannot be written.
    """
    check_drawable(path)
    import matplotlib
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "moesurgeon", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
        axes: Any = figure.subplots()
        colours = colormaps["viridis"]
        for place, (layer, points) in enumerate(curves.items()):
            axes.plot(
                [point["experts"] for point in points],
                [max(point["error"], _LEAST) for point in points],
                color=colours(place / max(1, len(curves) - 1)),
                linewidth=1.2,
                marker="." if len(points) <= 32 else None,
                label=f"layer {layer}",
            )
        axes.axhline(small, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_yscale("log")
        axes.set_ylim(bottom=_LEAST)
        axes.invert_xaxis()
        axes.set_xlabel("experts that stay")
        axes.set_ylabel("error of the layer's output, share of |y|²")
        axes.set_title(f"{title}: experts going one at a time, the least missed first", loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
        if len(curves) <= _NAMED:
            axes.legend(fontsize="small")
        else:
            numbers = [int(layer) for layer in curves]
            figure.colorbar(ScalarMappable(Normalize(min(numbers), max(numbers)), colours), ax=axes, label="layer")
        # Nothing of the moment goes into the file: the same curves give the same bytes.
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        kind = path.suffix.lower()
        with whole_file(path, overwrite=True) as part:
            figure.savefig(part, format=kind[1:], metadata=dates.get(kind))
