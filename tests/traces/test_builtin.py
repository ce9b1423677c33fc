from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.traces.builtin import BUILTIN_TRACES
from moesurgeon.traces.documents import SPLITS, Document, Split, in_split, split_of


def _documents(domain: str, split: Split) -> list[Document]:
    return list(BUILTIN_TRACES[domain](split))


@pytest.mark.parametrize("domain", BUILTIN_TRACES)
def test_nothing_reported_on_was_trained_or_calibrated_on(domain: str) -> None:
    report = _documents(domain, "report")
    assert len(report) >= 30
    texts, keys = {document.text for document in report}, {document.key for document in report}
    for split in ("train", "calibration"):
        others = _documents(domain, split)
        assert others
        assert not texts.intersection(document.text for document in others)
        assert not keys.intersection(document.key for document in others)


@pytest.mark.parametrize("domain", BUILTIN_TRACES)
def test_builtin_documents_are_the_same_every_time(domain: str) -> None:
    first, again = (list(islice(BUILTIN_TRACES[domain]("report"), 20)) for _ in range(2))
    assert first == again
    assert all(document.text.strip() and in_split(document.key, "report") for document in first)


@given(st.text())
def test_a_key_is_in_one_split(key: str) -> None:
    assert [split for split in SPLITS if in_split(key, split)] == [split_of(key), "all"]
