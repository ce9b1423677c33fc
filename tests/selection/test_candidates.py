"""The rule of thumb: who gets less than a share of the tokens, and what else is to be said of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.errors import NothingToDo
from moesurgeon.profiling.statistics import Statistics
from moesurgeon.selection.candidates import candidates, count_below, keep_above
from moesurgeon.selection.choose import best
from moesurgeon.selection.criteria import CRITERIA, scores_of
from tests.profiling.made import Made, random_documents, statistics_of


def _counted(tokens: list[list[float]], top_k: int = 1) -> Statistics:
    statistics = Statistics.empty(("text",), tuple(range(len(tokens))), len(tokens[0]), top_k)
    statistics.sums["tokens"][0, 0] = tokens
    statistics.sums["weight"][0, 0] = tokens
    statistics.sums["seen"][0, 0] = sum(tokens[0]) / top_k
    return statistics


@given(
    st.lists(st.lists(st.integers(0, 30), min_size=8, max_size=8).filter(any), min_size=1, max_size=3),
    st.sampled_from([1, 2, 4]),
    st.floats(0.01, 0.5),
)
def test_the_count_is_what_every_layer_and_group_can_lose(rows: list[list[int]], groups: int, below: float) -> None:
    statistics = _counted([[float(count) for count in row] for row in rows])
    size = 8 // groups
    cold = [
        sum(row[e] / sum(row) < below for e in range(group * size, (group + 1) * size))
        for row in rows
        for group in range(groups)
    ]
    assert count_below(statistics, below, groups) == min(cold) * groups


def test_a_share_is_of_the_tokens_not_of_what_was_routed() -> None:
    """With top-2 a token counts twice in what was routed: 0.6 % of the tokens is 0.3 % of that."""
    statistics = _counted([[1000.0, 1000.0, 982.0, 9.0, 9.0]], top_k=2)
    assert count_below(statistics, 0.005) == 0 and count_below(statistics, 0.007) == 2


def test_what_stays_can_run() -> None:
    statistics = _counted([[96.0, 1.0, 1.0, 1.0, 1.0]])
    assert keep_above(statistics, 0.02, 1) == 1
    assert keep_above(statistics, 0.02, 3) == 3
    with pytest.raises(NothingToDo, match=r"layer 0 has 4 experts under a share of 0.02.*keep 5 at least"):
        keep_above(statistics, 0.02, 5)
    with pytest.raises(NothingToDo, match="layer 1 has 0 experts"):
        keep_above(_counted([[97.0, 1.0, 1.0, 1.0], [25.0] * 4]), 0.02, 1)


@pytest.fixture
def listed() -> Statistics:
    """Expert 5 is surely cold, 6 perhaps, 7 was hardly seen; 4 is cold on average and hot in chats."""
    random = np.random.default_rng(2)
    code = random_documents(
        random, np.array([[0.5, 0.2, 0.2, 0.07, 0.005, 0.005, 0.02, 1e-9]]), 80, concentration=500.0
    )
    chat = random_documents(
        random, np.array([[0.3, 0.2, 0.2, 0.1, 0.175, 0.005, 0.02, 1e-9]]), 4, domain="chat", concentration=500.0
    )
    bump = Made("text", 300, np.array([[250.0, 0, 0, 0, 0, 0, 40.0, 10.0]]), fold=3)
    return statistics_of([*code, *chat, bump])


def test_candidates_are_listed_with_what_is_known_of_them(listed: Statistics) -> None:
    found = candidates(listed, 0.025)
    experts = {each["expert"]: each for each in found["layers"]["0"]}
    share = listed.utilization()[0]
    assert set(experts) == {e for e in range(8) if share[e] < 0.025} == {4, 5, 6, 7}
    assert found["count"] == 4 and found["below"] == 0.025
    for expert, each in experts.items():
        assert each["share"] == pytest.approx(share[expert])
        low, high = each["interval"]
        assert low <= each["share"] <= high
        assert each["sure"] == (high < 0.025)
    assert experts[5]["sure"] and not experts[6]["sure"]
    assert [experts[e]["supported"] for e in (4, 5, 6, 7)] == [True, True, True, False]
    assert [(n["kind"], n["where"]) for n in experts[4]["niches"]] == [("domain", "chat")]
    assert experts[5]["niches"] == []


def test_ranks_and_overlaps_are_those_of_the_choices(listed: Statistics) -> None:
    found = candidates(listed, 0.025)
    criteria = [name for name in CRITERIA if name != "random"]
    for criterion in criteria:
        for each in found["layers"]["0"]:
            # Rank r: it stays where r - 1 go, and goes where r go.
            rank, scores = each["ranks"][criterion], scores_of(listed, criterion)
            assert each["expert"] not in best(scores, (0,), 8 - rank)[0]
            assert each["expert"] in best(scores, (0,), 8 - rank + 1)[0]
    pairs = {tuple(pair["criteria"]): pair for pair in found["agreement"]}
    assert len(pairs) == len(criteria) * (len(criteria) - 1) // 2
    for (one, other), pair in pairs.items():
        gone = [set(range(8)) - set(best(scores_of(listed, name), (0,), 4)[0]) for name in (one, other)]
        assert pair["overlap"] == len(gone[0] & gone[1]) / 4
        assert -1 <= pair["rank_correlation"] <= 1


def test_of_a_server_s_counts_only_counting_is_compared() -> None:
    statistics = _counted([[96.0, 2.0, 1.0, 1.0]])
    statistics.sums["weight"][:] = 0.0
    found = candidates(statistics, 0.015)
    assert [list(each["ranks"]) for each in found["layers"]["0"]] == [["frequency"]] * 2
    assert [each["interval"] for each in found["layers"]["0"]] == [[0.0, None]] * 2
    assert not any(each["sure"] for each in found["layers"]["0"])
    assert found["agreement"] == []
