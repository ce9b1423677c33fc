"""From losses and use by way to tables and bars of ``recover_quality.py``. Nothing here runs a model.

A row says of one way with one seed what its documents cost and whom its routers choose on the report text:

    {"checkpoint", "top_k": [before, after], "way", "seed", "losses": [N], "usage": {LAYER: {...}}, "tokens",
     "cpu_seconds", ...}

Legend: N documents. Losses are sums of nats over the tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality_report import Array, Judged, Row, Value, bar_of, closed, markdown, rise

LAYERS, EVERYTHING, CUT = "layers", "layers, experts-all", "cut, layers, experts-all"
CLOSED = {LAYERS: 0.65, EVERYTHING: 0.85}
"""Share of the loss gap of the bare edit to top-1 that these ways have to close."""
CUT_RATIO = 1.05
"""Perplexity over the original's that top-1 with a quarter of the experts gone may end at, recovered."""


class Results:
    """Rows by what they are of."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self.texts = {row["text"]: Judged.of_row(row) for row in rows if "text" in row}
        self.rows = [row for row in rows if "losses" in row]

    def operations(self) -> list[tuple[str, tuple[int, int]]]:
        """Return checkpoints and their experts per token before and after, in the order they came in."""
        return list(dict.fromkeys((row["checkpoint"], tuple(row["top_k"])) for row in self.rows))

    def of(self, checkpoint: str, top_k: Sequence[int], way: str | None = None) -> list[Row]:
        return [
            row
            for row in self.rows
            if row["checkpoint"] == checkpoint and row["top_k"] == list(top_k) and way in (None, row["way"])
        ]

    def mean(self, checkpoint: str, top_k: Sequence[int], way: str) -> Array | None:
        """Return the losses on average over the seeds: their perplexities' geometric mean."""
        found = [row["losses"] for row in self.of(checkpoint, top_k, way)]
        return np.mean(found, axis=0) if found else None


def reference(way: str) -> str:
    """Return the bare way against whose gap ``way`` is held.

    >>> reference("cut, layers"), reference("layers, experts-all")
    ('cut', 'bare')
    """
    return "cut" if way.startswith("cut") else "bare"


def balance_of(usage: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the worst of all layers: least ``entropy``, largest ``busiest``, ``least`` used, most ``overflow``.

    ``fallen`` and ``starved``: how many experts of all layers have.
    """
    layers = list(usage.values())
    return {
        "entropy": min(layer["entropy"] for layer in layers),
        "busiest": max(layer["max_over_mean"] for layer in layers),
        "least": min(layer["least"] for layer in layers),
        "overflow": {name: max(layer["overflow"][name] for layer in layers) for name in layers[0]["overflow"]},
        "fallen": sum(len(layer["fallen"]) for layer in layers),
        "starved": sum(len(layer["starved"]) for layer in layers),
    }


def tables(results: Results) -> str:
    """Return, by operation, what every way costs, closes and does to the balance, as Markdown."""
    headings = ["way", "seeds", "rise of perplexity (95 %)", "gap closed (95 %)", "entropy, least", "busiest",
                "least used", "overflow at 1 / 1.25 / 2", "fallen (surely)", "tokens", "CPU s"]  # fmt: skip
    parts = []
    for checkpoint, top_k in results.operations():
        text, rows = results.texts[checkpoint], []
        for way, mine, losses in _ways(results, checkpoint, top_k):
            bare = results.mean(checkpoint, top_k, reference(way))
            rows.append([way, str(len(mine)), _spread(rise(text, losses), "+.1%"), _closed(text, bare, losses, way),
                         *_balance(mine), *_cost(mine)])  # fmt: skip
        parts.append(f"{name_of(checkpoint, top_k)}: mean of the seeds; of all layers the worst")
        parts.append(markdown(headings, rows))
    return "\n\n".join(parts)


def domain_table(results: Results) -> str:
    """Return the rise of perplexity by domain, as Markdown."""
    parts = []
    for checkpoint, top_k in results.operations():
        text = results.texts[checkpoint]
        rows = [
            [way, *(_spread(rise(text, losses, domain), "+.1%") for domain in text.domains)]
            for way, _rows, losses in _ways(results, checkpoint, top_k)
        ]
        parts.append(f"{name_of(checkpoint, top_k)}: rise of perplexity by domain (95 %)")
        parts.append(markdown(["way", *text.domains], rows))
    return "\n\n".join(parts)


def _ways(results: Results, checkpoint: str, top_k: Sequence[int]) -> Iterator[tuple[str, list[Row], Array]]:
    """Yield each way of an operation, its rows, and its losses on average over the seeds."""
    for way in dict.fromkeys(row["way"] for row in results.of(checkpoint, top_k)):
        losses = results.mean(checkpoint, top_k, way)
        assert losses is not None
        yield way, results.of(checkpoint, top_k, way), losses


def bars(results: Results) -> list[dict[str, Any]]:
    """Return what has to be reached, on average over the seeds, and whether it was."""
    found = []
    for checkpoint, top_k in results.operations():
        text, name = results.texts[checkpoint], name_of(checkpoint, top_k)
        bare = results.mean(checkpoint, top_k, "bare")
        for way, bar in CLOSED.items() if top_k[1] == 1 and bare is not None else ():
            losses = results.mean(checkpoint, top_k, way)
            if losses is not None:
                worst = min(closed(text, bare, np.array(r["losses"]))[0] for r in results.of(checkpoint, top_k, way))
                value = closed(text, bare, losses)
                found.append(bar_of(f"{name}: {way} close at least {bar:.0%} of the gap", value, bar, worst=worst))
        for way in (EVERYTHING, CUT):
            fallen = [balance_of(row["usage"])["fallen"] for row in results.of(checkpoint, top_k, way)]
            if fallen:
                most = float(max(fallen))
                told = f"{name}: {way}: no expert falls below a quarter of its fair share"
                found.append(bar_of(told, (most, most, most), 0.0, at_least=False))
        losses = results.mean(checkpoint, top_k, CUT)
        if losses is not None:
            ratio: Value = tuple(each + 1 for each in rise(text, losses))  # type: ignore[assignment]
            worst = max(rise(text, np.array(row["losses"]))[0] for row in results.of(checkpoint, top_k, CUT)) + 1
            told = f"{name} and 25 % fewer experts: {CUT} end at {CUT_RATIO} x the original's perplexity at most"
            found.append(bar_of(told, ratio, CUT_RATIO, at_least=False, worst=worst))
    return found


def told(results: Results, row: Row) -> str:
    """Return one line about ``row``, which is among ``results``."""
    text, losses = results.texts[row["checkpoint"]], np.array(row["losses"])
    bare, use = results.mean(row["checkpoint"], row["top_k"], reference(row["way"])), balance_of(row["usage"])
    return (
        f"{name_of(row['checkpoint'], row['top_k']):<28} {row['way']:<25} {row['seed']}  "
        f"rise {_spread(rise(text, losses), '+.1%')}, closed {_closed(text, bare, losses, row['way']) or '-'}, "
        f"least used {use['least']:.2f}, fallen {use['fallen']} ({use['starved']}), CPU {row['cpu_seconds']:.0f} s"
    )


def name_of(checkpoint: str, top_k: Sequence[int]) -> str:
    """Return an operation's name.

    >>> name_of("tiny-mixtral", [2, 1])
    'tiny-mixtral, top-2 -> top-1'
    """
    return f"{checkpoint}, top-{top_k[0]} -> top-{top_k[1]}"


def _closed(text: Judged, bare: Array | None, losses: Array, way: str) -> str:
    return "" if bare is None or way == reference(way) else _spread(closed(text, bare, losses), ".0%")


def _balance(rows: Sequence[Row]) -> list[str]:
    """Return the figures of the seeds' worst layers, on average; of the experts that fell the most of any seed."""
    found = [balance_of(row["usage"]) for row in rows]
    mean = {name: float(np.mean([each[name] for each in found])) for name in ("entropy", "busiest", "least")}
    overflow = [np.mean([each["overflow"][name] for each in found]) for name in found[0]["overflow"]]
    fallen, starved = (max(each[name] for each in found) for name in ("fallen", "starved"))
    return [
        f"{mean['entropy']:.3f}", f"{mean['busiest']:.2f} x", f"{mean['least']:.2f} x",
        " / ".join(f"{share:.1%}" for share in overflow), f"{fallen} ({starved})",
    ]  # fmt: skip


def _cost(rows: Sequence[Row]) -> list[str]:
    tokens, seconds = (np.mean([row[name] for row in rows]) for name in ("tokens", "cpu_seconds"))
    return [f"{tokens:,.0f}", f"{seconds:.0f}"]


def _spread(value: Value, form: str) -> str:
    return f"{value[0]:{form}} ({value[1]:{form}} to {value[2]:{form}})"
