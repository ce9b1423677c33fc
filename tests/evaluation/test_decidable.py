"""The gap that healing is to close, and whether the text that judges can tell it."""

from __future__ import annotations

import numpy as np
import pytest

from moesurgeon.evaluation.decidable import gap_of
from moesurgeon.evaluation.measure import LOSS, TEACHER_LOSS, Measurement


def _measured(rises: list[float], documents: list[int], tokens: int = 100) -> Measurement:
    """Return a measurement in which each window's tokens lose so much more than the teacher's."""
    sums = np.zeros((len(rises), 5))
    sums[:, LOSS], sums[:, TEACHER_LOSS] = (2 + np.array(rises)) * tokens, 2 * tokens
    buckets = np.zeros((len(rises), 1, 6))
    buckets[..., -1] = tokens
    buckets[:, 0, :5] = sums
    return Measurement(("d",), np.zeros(len(rises), dtype=np.int64), np.array(documents), buckets, 1.0, 1, True)


def test_documents_that_agree_decide() -> None:
    gap = gap_of(_measured([0.1, 0.11, 0.09, 0.1, 0.12, 0.1], [0, 1, 2, 3, 4, 5]))
    assert gap.decides and gap.warning is None and gap.documents == 6
    assert gap.loss == pytest.approx(0.62 / 6)
    assert gap.interval is not None and gap.interval[0] < gap.loss < gap.interval[1]


def test_documents_that_disagree_do_not_and_copies_do_not_help() -> None:
    few = gap_of(_measured([0.5, -0.3, 0.2], [0, 1, 2]))
    assert not few.decides
    assert "3 documents" in str(few.warning) and "wider than that; give more validation documents" in str(few.warning)
    # The same documents in more windows are no more documents.
    again = gap_of(_measured([0.5, -0.3, 0.2] * 20, [0, 1, 2] * 20))
    assert again.interval == pytest.approx(few.interval) and again.documents == 3


def test_one_document_has_no_interval() -> None:
    gap = gap_of(_measured([0.1, 0.1], [0, 0]))
    assert gap.interval is None and not gap.decides
    assert str(gap.warning).startswith("one document judges, which gives no interval")
    assert gap.as_dict() == {"loss": pytest.approx(0.1), "interval": None, "documents": 1, "decides": False}


def test_a_surely_lower_loss_is_decided_too() -> None:
    assert gap_of(_measured([-0.1, -0.11, -0.09, -0.1], [0, 1, 2, 3])).decides


def test_where_nothing_is_lost_nothing_is_decided() -> None:
    assert not gap_of(_measured([-0.01, 0.0, 0.005, 0.01], [0, 1, 2, 3])).decides
