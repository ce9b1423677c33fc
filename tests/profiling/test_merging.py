"""Profiles of one checkpoint as one, and what cannot be added up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesurgeon.errors import ProfileError
from moesurgeon.profiling.artefact import Profile
from moesurgeon.profiling.merging import merged_profiles
from moesurgeon.profiling.statistics import Statistics
from tests.profiling.made import profile_of, random_documents, statistics_of

A, B, C = Path("a"), Path("b"), Path("c")
DOCUMENTS = random_documents(np.random.default_rng(0), np.full((2, 4), 0.25), 12)


def _part(first: int, last: int, digest: str, **origin: Any) -> Profile:
    return profile_of(statistics_of(DOCUMENTS[first:last]), trace_hashes={"text": digest}, **origin)


def test_the_sum_is_the_profile_of_all_documents() -> None:
    parts = [(A, _part(0, 3, "1")), (B, _part(3, 9, "2")), (C, _part(9, 12, "3"))]
    merged, notes = merged_profiles(parts)
    whole = statistics_of(DOCUMENTS)
    for name, array in whole.sums.items():
        np.testing.assert_allclose(merged.statistics.sums[name], array, rtol=1e-12, err_msg=name)
    assert merged.origin.trace_hashes == {"text": "1+2+3"}
    assert notes == []
    turned, _ = merged_profiles(parts[::-1])
    assert turned.origin == merged.origin
    assert merged_profiles([(A, merged_profiles(parts[:2])[0]), parts[2]])[0].origin == merged.origin


def test_of_other_domains_each_keeps_what_is_its_own() -> None:
    chat = statistics_of([replace(made, domain="chat") for made in DOCUMENTS])
    other = profile_of(
        chat, splits={"chat": "report"}, trace_hashes={"chat": "2"}, weights={"chat": 3.0}, placement="cuda bfloat16"
    )
    merged, _ = merged_profiles([(A, _part(0, 12, "1")), (B, other)])
    assert merged.statistics.domains == ("text", "chat")
    assert merged.origin.splits == {"text": "all", "chat": "report"}
    assert merged.origin.trace_hashes == {"text": "1", "chat": "2"}
    assert merged.origin.weights == {"chat": 3.0}
    assert merged.origin.placement == "cpu float32, cuda bfloat16"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another checkpoint": ({"fingerprint": "e" * 64}, "taken from different checkpoints; compare them"),
    "another length": ({"length": 64}, "windows of 512 tokens, b of 64"),
    "another split": ({"splits": {"text": "report"}}, "b has the report split of text, the others its all split"),
    "the same text": ({"trace_hashes": {"text": "1"}}, "b holds the same text of text as the others"),
    "another weight": ({"weights": {"text": 2.0}}, "b gives text another weight"),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_others_are_refused(changes: dict[str, Any], says: str) -> None:
    other = profile_of(statistics_of(DOCUMENTS[6:]), **{"trace_hashes": {"text": "2"}, **changes})
    with pytest.raises(ProfileError, match=says) as raised:
        merged_profiles([(A, _part(0, 6, "1")), (B, other)])
    assert raised.value.exit_code == 3 and "\n" not in str(raised.value)


def test_the_same_text_is_found_also_in_what_was_merged_before() -> None:
    both, _ = merged_profiles([(A, _part(0, 6, "1")), (B, _part(6, 12, "2"))])
    with pytest.raises(ProfileError, match="the same text"):
        merged_profiles([(A, both), (C, _part(6, 12, "2"))])


def test_counts_and_profiles_do_not_add_up() -> None:
    counts = Statistics.empty(("text",), (0, 1), 4, 1)
    counts.sums["tokens"][:] = 1.0
    with pytest.raises(ProfileError, match="b holds a server's token counts only"):
        merged_profiles([(A, _part(0, 6, "1")), (B, profile_of(counts))])


def test_one_text_under_two_names_is_not_merged() -> None:
    one, other = _part(0, 6, "1"), _part(6, 12, "2")
    renamed = replace(other.origin, trace_hashes={"code": "3+1"}, splits={"code": "all"})
    with pytest.raises(ProfileError, match=r"b has under code the text that the others have under text; .* twice"):
        merged_profiles([(A, one), (B, replace(other, origin=renamed))])
