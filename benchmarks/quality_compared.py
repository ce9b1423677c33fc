"""How the criteria of ``prune_quality.py`` compare with one of them: perplexities over its own, paired by document."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.quality_report import Results, difference, markdown


def compared(results: Results, reference: str) -> str:
    """Return, as Markdown, the perplexity of every criterion over that of ``reference``, less 1.

    Of each checkpoint the mean over seeds and over the shares that both were measured at, with its 95 % interval over
    documents; a criterion that misses a share has the others.
    """
    parts = []
    for method in results.values("method"):
        rows = []
        names = [name for name in results.values("criterion", method=method) if name != reference]
        for checkpoint in results.texts:
            cells = [_cell(results, checkpoint, method, name, reference) for name in names]
            if any(cells):
                rows.append([checkpoint, *cells])
        if rows:
            title = f"Perplexity over that of {reference}, less 1, {method}: mean over seeds and counts"
            parts.append(f"{title}\n\n{markdown(['', *names], rows)}")
    return "\n\n".join(parts)


def _cell(results: Results, checkpoint: str, method: str, name: str, reference: str) -> str:
    of: dict[str, Any] = {"checkpoint": checkpoint, "method": method}
    pairs = [
        (results.mean(**of, share=share, criterion=name), results.mean(**of, share=share, criterion=reference))
        for share in results.values("share", **of)
    ]
    both = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    if not both:
        return ""
    mine, theirs = (np.mean(losses, axis=0) for losses in zip(*both, strict=True))
    value, low, high = difference(results.texts[checkpoint], mine, theirs)
    return f"{value:+.1%} ({low:+.1%} to {high:+.1%})"
