import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.errors import MoeSurgeonError, UsageError
from moesurgeon.traces.budgets import SHORTEST, named_values, shares_of, token_count, weights_of
from moesurgeon.traces.spec import parse_traces
from moesurgeon.traces.windows import load_corpus


def test_a_budget_is_for_its_trace_and_the_rest_is_divided_among_the_others() -> None:
    domains = ["a", "b", "c", "d"]
    assert shares_of(domains, 1000, {}) == {"a": 250, "b": 250, "c": 250, "d": 250}
    assert shares_of(domains, 1000, {"b": "2k"}) == {"a": 334, "b": 2000, "c": 333, "d": 333}
    assert shares_of(domains, None, {"b": 9}) == {"a": None, "b": 9, "c": None, "d": None}
    assert shares_of(["a"], 8, {"a": 70}) == {"a": 70}


@pytest.mark.parametrize(
    ("value", "count"),
    [("200k", 200_000), ("1.5M", 1_500_000), ("2G", 2 * 10**9), (8, 8), (" 64 ", 64), ("0.5K", 500), ("2.3k", 2300)],
)
def test_counts_of_tokens(value: str | int, count: int) -> None:
    assert token_count(value) == count


@pytest.mark.parametrize("value", ["7", 0, -5, "many", "1e6", "200 kB", "", "k", "9" * 40, True, "10.5", 10.5])
def test_what_is_no_count_is_wrong_usage(value: str | int) -> None:
    with pytest.raises(UsageError, match="is no budget: give a number of tokens from 8 on"):
        token_count(value)


@pytest.mark.parametrize("value", [True, "1_0", "two", -1, float("nan")])
def test_what_is_no_weight_is_wrong_usage(value: str | float) -> None:
    with pytest.raises(UsageError, match="is no weight: give a number from 0 on"):
        weights_of(["a"], {"a": value})


@given(st.text(max_size=40), st.floats(allow_nan=True))
def test_any_value_is_understood_or_refused_in_a_line(text: str, number: float) -> None:
    for read in (
        lambda: token_count(text),
        lambda: weights_of(["a"], {"a": text}),
        lambda: weights_of(["a"], {"a": number}),
    ):
        try:
            read()
        except MoeSurgeonError as error:
            assert "\n" not in str(error) or "\n" in text


@pytest.mark.parametrize("texts", [["code"], ["=5"], ["code="], ["code=5", "code=6"]])
def test_pairs_of_another_form(texts: list[str]) -> None:
    with pytest.raises(UsageError, match=r"--budget .*(NAME=VALUE|twice)"):
        named_values("--budget", texts)


def test_weights_are_of_the_traces_that_there_are() -> None:
    assert weights_of(["code", "chat"], {}) == {}
    assert weights_of(["code", "chat"], {"chat": "0.5"}) == {"code": 1.0, "chat": 0.5}
    assert weights_of(["code", "chat"], {"chat": 0}) == {"code": 1.0, "chat": 0.0}
    for given_, says in (
        ({"cat": 2}, "'cat', but the traces are code, chat"),
        ({"chat": "-1"}, "--weight chat=-1 is no weight"),
        ({"chat": "inf"}, "is no weight"),
        ({"chat": "two"}, "is no weight"),
        ({"chat": 0, "code": 0}, "every --weight is 0"),
    ):
        with pytest.raises(UsageError, match=says):
            weights_of(["code", "chat"], given_)


def test_a_corpus_keeps_to_its_budgets() -> None:
    specs = parse_traces(["builtin:arithmetic", "builtin:json", "builtin:logs"])
    corpus = load_corpus(
        specs, lambda texts: [list(text.encode()) for text in texts], splits=["report"] * 3, length=64, max_tokens=2000,
        budgets={"json": "5k"},
    )  # fmt: skip
    assert {name: count // 8 for name, count in corpus.tokens.items()} == {"arithmetic": 125, "json": 625, "logs": 125}
    assert SHORTEST == 8
