"""How a cut is asked for: by what experts are chosen, how many stay, and what the result has to fulfil."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesurgeon.errors import UsageError
from moesurgeon.pipeline.options import HealSpec

HEALED = "healed"
"""The criterion that needs the running model and text."""


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """How many experts stay and by what they are chosen.

    Either ``keep_experts`` (a file with the choice; a ``profile`` then says what traffic goes) or ``profile`` with
    ``keep`` (a count per layer), ``ratio`` (the share to remove) or ``below`` (as many as have under this share of the
    tokens in every layer). ``criterion`` None: reap, with ``below`` frequency. ``seed`` is for the random criterion.
    ``protect``: texts whose experts stay, each NAME[=share] (``selection.protect``). ``virtual``: experts are put out
    of reach by their bias instead of removed, so that layers may lose different numbers. ``curve``: also say what any
    count costs each layer, and draw it to ``curve_plot`` if that is given. ``heal``: repair the layers on text before
    writing; the criterion healed chooses on it as well.

    ``stages``: cut in several steps, each with a new profile, as ``selection.counts`` reads it (or a list of counts).
    ``gates``: what the result of each step has to fulfil on validation text, or it is rolled back. ``search``: find the
    smallest count that does. ``run``: the folder that stages are kept in (None: beside the output, until it is
    written).
    """

    profile: Path | None = None
    keep: int | None = None
    ratio: float | None = None
    below: float | None = None
    keep_experts: Path | None = None
    criterion: str | None = None
    seed: int = 0
    protect: tuple[str, ...] = ()
    virtual: bool = False
    heal: HealSpec | None = None
    curve: bool = False
    curve_plot: Path | None = None
    stages: str | tuple[int, ...] | None = None
    gates: tuple[str, ...] = ()
    search: bool = False
    run: Path | None = None

    @property
    def wants_curve(self) -> bool:
        return self.curve or self.curve_plot is not None

    @property
    def is_staged(self) -> bool:
        """Whether the cut is judged, in one step or several."""
        return self.stages is not None or bool(self.gates) or self.search


def refuse_without_healing(criterion: str | None, heal: HealSpec | None) -> None:
    """Raise UsageError for the criterion ``healed`` where nothing is healed."""
    if criterion == HEALED and heal is None:
        raise UsageError(
            "--criterion healed keeps the experts with which healing leaves least, so it needs text: add --heal TRACES"
        )
    if criterion == HEALED and heal is not None and heal.method == "none":
        raise UsageError(
            "--criterion healed is for a cut that is healed, and --heal-method none heals nothing; choose by reap, or "
            "another method"
        )
