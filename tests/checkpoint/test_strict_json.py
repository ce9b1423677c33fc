"""JSON that people write: a key that comes twice is refused, with its lines."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.checkpoint.strict_json import holds_numbers, parse_strictly, whole_number

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(JSON)
def test_what_names_no_key_twice_is_read_as_it_is(value: object) -> None:
    assert parse_strictly(json.dumps(value)) == value
    assert parse_strictly(json.dumps({"a": value, "b": value}, indent=1)) == {"a": value, "b": value}


@given(JSON, st.text(max_size=5))
def test_a_key_that_comes_twice_is_named_with_its_lines(value: object, key: str) -> None:
    """Whatever else is there, and however deep."""
    one, name = json.dumps(value), json.dumps(key)
    text = f'[{one}, {{"x": {one},\n{name}x: {one}, '.replace(f"{name}x", name) + f"\n{name} : {one}}}]"
    with pytest.raises(ValueError, match="comes twice") as raised:
        parse_strictly(text)
    first = 1 if key == "x" else 2  # "x" is there already
    second = 2 if key == "x" else 3
    assert f"the key {name} comes twice, in lines {first} and {second};" in str(raised.value)


def test_an_escape_hides_no_duplicate() -> None:
    with pytest.raises(ValueError, match="comes twice, in line 1;"):
        parse_strictly('{"a": "}{", "\\u0061": 2}')


@pytest.mark.parametrize("text", ["", "00", "01", "+1", "-1", " 1", "1_0", "1.0", "\u0661", "true", "9" * 30])
def test_one_number_has_one_spelling(text: str) -> None:
    with pytest.raises(ValueError, match="is no number written in digits"):
        whole_number(text)


def test_numbers() -> None:
    assert holds_numbers([1, 2.5, [float("nan")]]) and holds_numbers(3) and holds_numbers([])
    for value in (True, "3", None, [1, True], [["3"]], {"a": 1}):
        assert not holds_numbers(value)
