"""Whether the text that judges is enough to decide: the gap that healing is to close, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.evaluation.measure import LOSS, TEACHER_LOSS, Measurement
from moesurgeon.evaluation.summary import bootstrap


@dataclass(frozen=True)
class Gap:
    """The mean loss above the teacher's, ``loss``, its 95 % ``interval`` over ``documents`` (None: of one document)."""

    loss: float
    interval: tuple[float, float] | None
    documents: int

    @property
    def decides(self) -> bool:
        """Whether the interval is narrower than the gap, which may be a surely negative one."""
        return self.interval is not None and self.interval[1] - self.interval[0] <= abs(self.loss)

    @property
    def warning(self) -> str | None:
        """What to say where the text does not decide, and what to do; None where it does."""
        if self.decides:
            return None
        documents = "one document" if self.documents == 1 else f"{self.documents} documents"
        if self.interval is None:
            return f"{documents} judges, which gives no interval: give more validation documents"
        low, high = self.interval
        return (
            f"the validation text is too little to decide: on its {documents} the unhealed loss differs from the "
            f"teacher's by {self.loss:+.4f}, with a 95 % interval of {low:+.4f} to {high:+.4f}, which is wider than "
            "that; give more validation documents"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as reports have it."""
        return {
            "loss": self.loss,
            "interval": None if self.interval is None else list(self.interval),
            "documents": self.documents,
            "decides": self.decides,
        }


def gap_of(measured: Measurement) -> Gap:
    """Return the gap of a measurement that has a teacher."""
    return gap_between(measured, measured.sums[:, LOSS], measured.sums[:, TEACHER_LOSS])


def gap_between(like: Measurement, mine: NDArray[np.float64], teacher: NDArray[np.float64]) -> Gap:
    """Return the gap of losses by window, ``mine`` and those of the ``teacher``; ``like`` knows the documents."""
    keys = np.stack([like.domain, like.document], axis=1)
    _, place = np.unique(keys, axis=0, return_inverse=True)
    place = place.reshape(-1)
    rises, counts = np.zeros(place.max() + 1), np.zeros(place.max() + 1)
    np.add.at(rises, place, mine - teacher)
    np.add.at(counts, place, like.positions)
    return Gap(float(rises.sum() / counts.sum()), bootstrap(rises, counts), len(counts))


def losses_of(measured: Measurement) -> dict[str, float]:
    """Return the mean ``loss`` of a measurement, and the ``teacher``'s."""
    totals, count = measured.sums.sum(axis=0), float(measured.positions.sum())
    return {"loss": float(totals[LOSS] / count), "teacher": float(totals[TEACHER_LOSS] / count)}


def gap_closed(unhealed: Mapping[str, float], healed: Mapping[str, float]) -> float | None:
    """Return the share of the loss gap to the teacher that was closed, both as of :func:`losses_of`; None of no gap."""
    gap = unhealed["loss"] - unhealed["teacher"]
    return (unhealed["loss"] - healed["loss"]) / gap if gap > 0 else None
