"""From losses by document to what a cut costs: rises, shares of a gap, differences, each with its interval; bars.

Nothing here runs a model; ``prune_quality.py`` measures. A row says of one cut what its documents cost:

    {"checkpoint", "layout", "without", "seed", "share", "keep", "criterion", "method", "losses": [N], ...}

Legend: N documents. Losses are sums of nats over the tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.evaluation.summary import bootstrap

Array = NDArray[np.float64]
Row = dict[str, Any]
Value = tuple[float, float, float]
"""A figure with its 95 % interval: bootstrap over documents, paired."""

QUARTER = 0.25
CLOSED = {"coarse": 0.90, "fine": 0.55}
"""Share of the bare cut's loss gap that healing has to close at a quarter of the experts, by layout."""
RISE = {"coarse": 0.1, "fine": 0.5}
"""Rise that may be left there, as a share of that of REAP's bare cut."""


@dataclass(frozen=True)
class Judged:
    """The text that all cuts of a checkpoint are judged on: ``domain`` (a number), tokens and loss uncut, each [N]."""

    domains: tuple[str, ...]
    domain: NDArray[np.int64]
    positions: Array
    teacher: Array

    @classmethod
    def of_row(cls, row: Row) -> Judged:
        return cls(tuple(row["domains"]), np.array(row["domain"]), np.array(row["positions"]), np.array(row["teacher"]))

    def within(self, domain: str | None) -> NDArray[np.bool_]:
        """Return which documents are of ``domain`` (None: all)."""
        return np.ones(len(self.domain), dtype=bool) if domain is None else self.domain == self.domains.index(domain)


def rise(text: Judged, losses: Array, domain: str | None = None) -> Value:
    """Return how much higher the perplexity is than uncut, less 1."""
    mine = text.within(domain)
    return _ratio((losses - text.teacher)[mine], text.positions[mine])


def difference(text: Judged, losses: Array, others: Array, domain: str | None = None) -> Value:
    """Return how much higher the perplexity is than with ``others``, less 1."""
    mine = text.within(domain)
    return _ratio((losses - others)[mine], text.positions[mine])


def closed(text: Judged, bare: Array, healed: Array) -> Value:
    """Return the share of the loss gap of ``bare`` that ``healed`` closes."""
    gap, left = bare - text.teacher, healed - text.teacher
    low, high = _interval(left, gap)
    return 1 - float(left.sum() / gap.sum()), 1 - high, 1 - low


def _interval(sums: Array, counts: Array) -> tuple[float, float]:
    found = bootstrap(sums, counts)
    if found is None:
        raise SystemExit("one document gives no interval: raise the report tokens")
    return found


def _ratio(rises: Array, counts: Array) -> Value:
    low, high = _interval(rises, counts)
    return tuple(float(np.expm1(each)) for each in (rises.sum() / counts.sum(), low, high))  # type: ignore[return-value]


class Results:
    """Rows by what they are of."""

    def __init__(self, rows: Iterable[Row], on: str = "report") -> None:
        """``on``: "report", or "validation" where rows have losses of that text too."""
        rows = list(rows)
        if on == "validation":
            rows = [
                {**row, **row[on]} if "text" in row else {**row, "losses": row[on]} for row in rows if on in row
            ]  # fmt: skip
        self.texts = {row["text"]: Judged.of_row(row) for row in rows if "text" in row}
        self.rows = [row for row in rows if "losses" in row]
        self.layouts = {row["checkpoint"]: row["layout"] for row in self.rows}

    def seeds(self, **of: Any) -> dict[int, Array]:
        """Return the losses by seed of the cut that is ``of`` this checkpoint, share, criterion, method and domain."""
        of = {"without": None, **of}
        return {
            row["seed"]: np.array(row["losses"])
            for row in self.rows
            if all(row[name] == value for name, value in of.items())
        }

    def mean(self, **of: Any) -> Array | None:
        """Return the losses on average over the seeds: their perplexities' geometric mean."""
        found = list(self.seeds(**of).values())
        return np.mean(found, axis=0) if found else None

    def values(self, name: str, **of: Any) -> list[Any]:
        """Return which values of ``name`` there are, in the order they came in."""
        of = {"without": None, **of}
        return list(
            dict.fromkeys(row[name] for row in self.rows if all(row[key] == value for key, value in of.items()))
        )


def tables(results: Results) -> str:
    """Return what every cut costs and what healing closes of it, as Markdown."""
    parts = []
    for name, text in results.texts.items():
        of = {"checkpoint": name}
        shares = sorted(results.values("share", **of))
        methods = results.values("method", **of)
        columns = [(share, method) for share in shares for method in methods]
        headings = [f"{share:.1%} {method}" for share, method in columns]
        rows = []
        for criterion in results.values("criterion", **of):
            cells = [
                _cell(results, text, of | {"share": share, "criterion": criterion, "method": method})
                for share, method in columns
            ]
            rows.append([criterion, *cells])
        seeds = len(results.values("seed", **of))
        parts.append(
            f"{name}: rise of perplexity, mean of {seeds} seeds (95 % interval over documents), and what healing closes"
        )
        parts.append(markdown(["criterion", *headings], rows))
    return "\n\n".join(parts)


def _cell(results: Results, text: Judged, of: dict[str, Any]) -> str:
    losses = results.mean(**of)
    if losses is None:
        return ""
    value, low, high = rise(text, losses)
    told = f"{value:+.1%} ({low:+.1%} to {high:+.1%})"
    bare = results.mean(**{**of, "method": "bare"})
    if of["method"] == "bare" or bare is None:
        return told
    return f"{told}, {closed(text, bare, losses)[0]:.0%}"


def unseen_table(results: Results) -> str:
    """Return how domains fare that neither chose nor healed, as Markdown; empty where none was left out."""
    rows = []
    for name, text in results.texts.items():
        for domain in [each for each in _left_out(results, name) if each is not None]:
            of = {"checkpoint": name, "without": domain}
            for share in results.values("share", **of):
                for criterion in results.values("criterion", **of):
                    cells = [f"{name}, without {domain}", f"{share:.1%} by {criterion}"]
                    for method in results.values("method", **of, share=share, criterion=criterion):
                        losses = results.mean(**of, share=share, criterion=criterion, method=method)
                        assert losses is not None
                        value, low, high = rise(text, losses, domain)
                        cells.append(f"{method} {value:+.1%} ({low:+.1%} to {high:+.1%})")
                    rows.append(cells)
    if not rows:
        return ""
    width = max(len(row) for row in rows)
    return "Rise in a domain that was in no calibration text\n\n" + markdown(
        ["", "cut", *[""] * (width - 2)], [row + [""] * (width - len(row)) for row in rows]
    )


def _left_out(results: Results, name: str) -> list[str | None]:
    return list(dict.fromkeys(row["without"] for row in results.rows if row["checkpoint"] == name))


def bars(results: Results) -> list[dict[str, Any]]:
    """Return what has to be reached at a quarter of the experts, on average over the seeds, and whether it was."""
    found = []
    for name, text in results.texts.items():
        layout = results.layouts.get(name)
        if layout is None:
            continue
        of = {"checkpoint": name, "share": QUARTER}
        best = _strongest(results.values("method", **of))
        reference = results.mean(**of, criterion="reap", method="bare")
        if best is None or reference is None:
            continue
        for criterion in ("reap", "healed"):
            bare, after = (results.mean(**of, criterion=criterion, method=method) for method in ("bare", best))
            if bare is None or after is None:
                continue
            bares, afters = (results.seeds(**of, criterion=criterion, method=method) for method in ("bare", best))
            worst = min(closed(text, bares[seed], afters[seed])[0] for seed in bares.keys() & afters.keys())
            bar = CLOSED[layout]
            found.append(
                bar_of(f"{name}, {criterion}: {best} closes at least {bar:.0%} of the bare cut's gap",
                     closed(text, bare, after), bar, at_least=True, worst=worst)
            )  # fmt: skip
            whole = rise(text, reference)[0]
            share = tuple(each / whole for each in rise(text, after))
            worst = max(rise(text, losses)[0] for losses in afters.values()) / whole
            bar = RISE[layout]
            found.append(
                bar_of(f"{name}, {criterion}: {best} leaves at most {bar:g} x the rise of bare REAP",
                     share, bar, at_least=False, worst=worst)
            )  # fmt: skip
        found += _against_others(results, text, of, best)
        found += _unseen(results, text, name)
    return found + _on_average(results)


def _strongest(methods: Sequence[str]) -> str | None:
    return next((method for method in ("distill", "ridge", "scale") if method in methods), None)


def _against_others(results: Results, text: Judged, of: dict[str, Any], best: str) -> list[dict[str, Any]]:
    """``healed``, once healed, is to be as good as every other criterion."""
    mine = results.mean(**of, criterion="healed", method=best)
    if mine is None:
        return []
    found = []
    for other in results.values("criterion", **of, method=best):
        theirs = results.mean(**of, criterion=other, method=best)
        if other != "healed" and theirs is not None:
            told = f"{of['checkpoint']}: after {best}, perplexity by healed over that by {other}, less 1, at most 0"
            found.append(bar_of(told, difference(text, mine, theirs), 0.0, at_least=False))
    return found


def _on_average(results: Results) -> list[dict[str, Any]]:
    """The same over all counts and checkpoints together, each checkpoint as much as another."""
    best = _strongest(results.values("method"))
    found = []
    for other in results.values("criterion", method=best):
        cuts, away, weights = 0, [], []
        for name, text in results.texts.items():
            pairs = [
                [results.mean(checkpoint=name, share=share, criterion=each, method=best) for each in ("healed", other)]
                for share in results.values("share", checkpoint=name)
            ]
            differences = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
            if differences and other != "healed":
                cuts += len(differences)
                away.append(np.mean(differences, axis=0) / text.positions.sum())
                weights.append(text.positions / text.positions.sum())
        if cuts > 1:
            told = f"{cuts} cuts on average: after {best}, perplexity by healed over that by {other}, less 1, at most 0"
            found.append(bar_of(told, _ratio(np.concatenate(away), np.concatenate(weights)), 0.0, at_least=False))
    return found


def _unseen(results: Results, text: Judged, name: str) -> list[dict[str, Any]]:
    found = []
    for domain in _left_out(results, name):
        if domain is None:
            continue
        of = {"checkpoint": name, "without": domain}
        for share in results.values("share", **of):
            for criterion in results.values("criterion", **of, share=share):
                cut = of | {"share": share, "criterion": criterion}
                best = _strongest(results.values("method", **cut))
                bare, after = (results.mean(**cut, method=method) for method in ("bare", best))
                if bare is None or after is None:
                    continue
                told = f"{name}, {domain} unseen, {share:.1%} by {criterion}: {best} over bare, less 1, at most 0"
                found.append(bar_of(told, difference(text, after, bare, domain), 0.0, at_least=False))
    return found


def bar_of(
    name: str, value: Sequence[float], bar: float, *, at_least: bool = True, worst: float | None = None
) -> dict[str, Any]:
    """Return whether ``value`` (with its interval) reaches ``bar``; ``worst``: that of the worst seed."""
    met = value[0] >= bar if at_least else value[0] <= bar
    told = f"{name}: {value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"
    told += "" if worst is None else f", worst seed {worst:.3f}"
    return {"name": name, "value": value[0], "interval": list(value[1:]), "worst_seed": worst, "bar": bar, "met": met,
            "text": f"{told}, {'met' if met else 'MISSED'}"}  # fmt: skip


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("|" + "|".join(cells if cells[0] == "---" else [f" {cell} " for cell in cells]) + "|"
                     for cells in lines)  # fmt: skip
