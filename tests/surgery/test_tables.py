"""Tables from token to experts without some of the experts, against the same rule as a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import CheckpointError
from moesurgeon.surgery.tables import first_columns, without_experts
from tests.families.second_opinion import table_by_loop

EXPERTS = 8


def _spec(table: NDArray[np.integer]) -> TensorSpec:
    return TensorSpec("layers.0.ffn.gate.tid2eid", f"I{8 * table.itemsize}", table.shape)


def _pruned(table: NDArray[np.integer], kept: list[int], experts: int = EXPERTS) -> NDArray[np.integer]:
    raw = without_experts(_spec(table), experts, kept)(table.tobytes())
    return np.frombuffer(raw, dtype=table.dtype).reshape(table.shape)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 4), st.sampled_from([np.int32, np.int64]))
def test_the_loop_says_the_same(data: st.DataObject, columns: int, dtype: type) -> None:
    table = data.draw(arrays(dtype, st.tuples(st.integers(1, 40), st.just(columns)), elements=st.integers(0, 7)))
    kept = sorted(data.draw(st.sets(st.integers(0, 7), min_size=columns)))
    assert _pruned(table, kept).tolist() == table_by_loop(table.tolist(), kept)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(8, 2), (16, 3), (64, 6)]), st.integers(0, 200))
def test_what_stays_stays_and_no_token_gets_an_expert_twice(seed: int, shape: tuple[int, int], tokens: int) -> None:
    experts, columns = shape
    random = np.random.default_rng(seed)
    table = np.array([random.permutation(experts)[:columns] for _ in range(tokens)], dtype=np.int64)
    table = table.reshape(tokens, columns)
    kept = np.sort(random.permutation(experts)[: random.integers(columns, experts + 1)])
    pruned = _pruned(table, kept.tolist(), experts)
    stayed = np.isin(table, kept)
    assert (kept[pruned[stayed]] == table[stayed]).all()
    assert all(len(set(row)) == columns for row in pruned.tolist())
    assert (pruned == _pruned(table, kept.tolist(), experts)).all()


def test_a_balanced_table_stays_balanced() -> None:
    """As large as the real ones: 129,280 tokens, 256 experts, six each; a quarter of the experts go."""
    random = np.random.default_rng(0)
    tokens, experts, columns = 129_280, 256, 6
    start = random.permutation(tokens) % experts
    strides = 2 * random.integers(0, 16, tokens) + 1
    table = (start[:, None] + strides[:, None] * np.arange(columns)) % experts
    before = np.bincount(table.ravel(), minlength=experts)
    assert before.max() - before.min() <= 0.15 * before.mean()
    pruned = _pruned(table, sorted(random.permutation(experts)[:192].tolist()), experts)
    after = np.bincount(pruned.ravel(), minlength=192)
    assert after.max() - after.min() <= 2
    ordered = np.sort(pruned, axis=1)
    assert (ordered[:, 1:] != ordered[:, :-1]).all()


def test_one_expert_less_than_enough_for_everybody() -> None:
    table = np.array([[0, 1], [1, 2], [2, 0], [2, 2]], dtype=np.int32)
    assert _pruned(table, [0, 1]).tolist() == [[0, 1], [1, 0], [1, 0], [1, 0]]


@pytest.mark.parametrize("wrong", [-1, 8])
def test_an_expert_that_is_not_there_is_named(wrong: int) -> None:
    with pytest.raises(CheckpointError, match=rf"tid2eid names expert {wrong}, but there are 8; restore the table"):
        _pruned(np.array([[0, 1], [wrong, 2]]), [0, 1, 2])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_columns_are_one_part(dtype: type, count: int) -> None:
    table = np.arange(12, dtype=dtype).reshape(4, 3)
    output = first_columns(_spec(table), count)
    (part,) = output.parts
    assert output.spec.shape == (4, count) and part.length == output.spec.nbytes
    raw = part.function(table.tobytes())  # type: ignore[union-attr]
    assert (np.frombuffer(raw, dtype=dtype).reshape(4, count) == table[:, :count]).all()
