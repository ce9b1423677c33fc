"""The record of what was done is untrusted: whatever stands in moesurgeon.json, doing it again is right or refused."""

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery.replay import replay
from tests.families.factory import save_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(str(save_checkpoint(tmp_path_factory.mktemp("source"), "deepseek")))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
OPERATIONS = st.lists(
    ANYTHING
    | st.fixed_dictionaries(
        {"operation": st.sampled_from(["retop", "prune", "layout", "recover"])},
        optional={
            "top_k": ANYTHING | st.fixed_dictionaries({"after": ANYTHING}),
            "expert_map": ANYTHING | st.dictionaries(st.sampled_from(["0", "1", "2", "x"]), ANYTHING, max_size=3),
            "layout": ANYTHING | st.sampled_from(["fused", "qwen2-moe"]),
            "replaced": ANYTHING | st.lists(st.sampled_from(["model.norm.weight", "x"]), max_size=2),
        },
    ),
    max_size=3,
)


@given(OPERATIONS)
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@example([{"operation": "retop", "top_k": {"after": float("inf")}}])
@example([{"operation": "prune", "expert_map": {}}])
@example([{"operation": "layout", "layout": "qwen2-moe"}, {"operation": "layout", "layout": "qwen2-moe"}])
@example([[]])
def test_no_record_breaks_anything(source: Subject, operations: list[Any]) -> None:
    """What cannot be done again is a CheckpointError."""
    try:
        plan = replay(source.anatomy, operations)
    except CheckpointError as error:
        assert len(str(error)) < 500
    else:
        plan.check(source.anatomy.tensors)
