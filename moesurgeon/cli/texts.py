"""The options that say what the model is run on, as the object that operations take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: `--help` needs none of it
    from moesurgeon.pipeline.options import Text
    from moesurgeon.traces.documents import Split


def text_of(
    traces: Sequence[str],
    *,
    split: Split | None,
    max_tokens: int,
    length: int | None,
    budget: Sequence[str],
    sample: int | None,
    weight: Sequence[str] = (),
) -> Text:
    """Return the text that ``traces`` and the options beside it ask for; UsageError for a malformed NAME=VALUE."""
    from moesurgeon.pipeline.options import Text
    from moesurgeon.traces.budgets import named_values

    return Text(
        traces=tuple(traces),
        split=split,
        max_tokens=max_tokens,
        length=length,
        budgets=dict(named_values("--budget", budget)),
        weights=dict(named_values("--weight", weight)),
        sample=sample,
    )
