"""Plans account for every byte of the source, and compose to one plan that does the same."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace as with_fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.checkpoint.writer import Fresh
from moesurgeon.errors import CheckpointError
from moesurgeon.surgery import edits
from moesurgeon.surgery.edits import Derived, Output, Part, Pure, Slice
from moesurgeon.surgery.plan import REMOVED, EditPlan, compose

Table = Mapping[str, TensorSpec]

SOURCE: Table = {
    "router": TensorSpec("router", "BF16", (6, 3)),
    "fused": TensorSpec("fused", "U8", (6, 4, 2)),
    "columns": TensorSpec("columns", "F32", (1, 6)),
    "norm": TensorSpec("norm", "F32", (5,)),
    "empty": TensorSpec("empty", "F32", (0, 2)),
    "scalar": TensorSpec("scalar", "I64", ()),
}


ROUTER, FUSED = SOURCE["router"], SOURCE["fused"]


def _identity() -> dict[str, Output]:
    return {name: edits.copy(spec) for name, spec in SOURCE.items()}


def _bytes(table: Table) -> dict[str, bytes]:
    """Return bytes for the tensors, all different."""
    counter = itertools.count()
    return {name: bytes(next(counter) % 256 for _ in range(spec.nbytes)) for name, spec in table.items()}


def _done(plan: EditPlan, source: Mapping[str, bytes]) -> dict[str, bytes]:
    """Do what ``plan`` says, in memory."""

    def bytes_of(part: Part) -> bytes:
        match part:
            case Slice(tensor, start, stop):
                return source[tensor][start:stop]
            case Fresh(_, load, _):
                return load()
            case Derived(_, parts, function):
                return function(b"".join(map(bytes_of, parts)))

    done = {name: b"".join(map(bytes_of, output.parts)) for name, output in plan.outputs.items()}
    assert all(len(done[name]) == output.spec.nbytes for name, output in plan.outputs.items())
    return done


def _specs(plan: EditPlan) -> Table:
    return {name: output.spec for name, output in plan.outputs.items()}


_reversed = Pure("reversed", lambda data: data[::-1])


@st.composite
def plans(draw: st.DrawFn, table: Table, tag: str) -> EditPlan:
    """Draw a plan for ``table`` that does any of the edits to any of the tensors; ``tag`` makes new names."""
    outputs: list[Output] = []
    dropped: dict[str, str] = {}
    for number, (name, spec) in enumerate(table.items()):
        ways = ["copy", "copy", "rename", "transform", "replace", "add", "drop"]
        ways += ["select", "select"] if math.prod(spec.shape) and spec.shape else []
        ways += ["split"] if math.prod(spec.shape) and spec.shape and spec.shape[0] > 1 else []
        match draw(st.sampled_from(ways)):
            case "copy":
                outputs.append(edits.copy(spec))
            case "rename":
                outputs.append(edits.rename(edits.copy(spec), f"{tag}{number}"))
            case "transform":
                outputs.append(edits.transform(spec, _reversed))
            case "replace":
                data = draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
                outputs.append(edits.replace(spec, lambda data=data: data, key=data.hex()))
            case "add":
                new = TensorSpec(f"{tag}{number}", "U8", (3,))
                outputs += [edits.copy(spec), edits.add(new, lambda: b"new", key="new", beside=name)]
            case "drop":
                dropped[name] = f"dropped by {tag}"
            case "select":
                axis = draw(st.integers(0, len(spec.shape) - 1))
                kept = draw(st.sets(st.integers(0, spec.shape[axis] - 1)).map(sorted))
                outputs.append(edits.select(spec, axis, kept))
            case "split":
                rows, rest = spec.shape[0], spec.shape[1:]
                at = draw(st.integers(1, rows - 1))
                middle = at * spec.nbytes // rows
                outputs.append(edits.split(spec, f"{tag}{number}", 0, middle, (at, *rest)))
                outputs.append(edits.split(spec, name, middle, spec.nbytes, (rows - at, *rest)))
    bytes_only = [output for output in outputs if output.is_untouched and output.spec.dtype == "U8"]
    if len(bytes_only) > 1 and draw(st.booleans()):
        pieces = [output.spec for output in bytes_only]
        joined = edits.join(f"{tag}joined", pieces, (sum(piece.nbytes for piece in pieces),))
        outputs = [output for output in outputs if output not in bytes_only] + [joined]
    config = draw(st.dictionaries(st.sampled_from("abc"), st.sampled_from([1, 2, REMOVED]), max_size=2))
    return EditPlan({out.spec.name: out for out in outputs}, dropped, config, [{"operation": tag}])


@st.composite
def chains(draw: st.DrawFn, length: int) -> list[EditPlan]:
    """Draw plans each of which is made from what the one before results in."""
    table, chain = SOURCE, []
    for number in range(length):
        chain.append(draw(plans(table, f"step{number}_")))
        table = _specs(chain[-1])
    return chain


def _splits_what_was_transformed(chain: list[EditPlan]) -> bool:
    transformed: set[str] = set()
    for plan in chain:
        split = [name for out in plan.outputs.values() if out.verb == "split" for name in out.sources]
        if transformed.intersection(split):
            return True
        made = {name for name, out in plan.outputs.items() if transformed.intersection(out.sources)}
        transformed = made | {name for name, out in plan.outputs.items() if out.verb == "transform"}
    return False


@given(chains(2))
@settings(max_examples=300)
def test_one_plan_does_what_two_do(chain: list[EditPlan]) -> None:
    first, second = chain
    composed = compose(first, second)
    source = _bytes(SOURCE)
    assert _done(composed, source) == _done(second, _done(first, source))
    assert _specs(composed) == _specs(second)
    config = {"a": 0, "b": 0, "z": 0}
    assert composed.edited_config(config) == second.edited_config(first.edited_config(config))
    assert [step["operation"] for step in composed.record] == ["step0_", "step1_"]


@given(chains(2))
@settings(max_examples=200)
def test_a_composed_plan_accounts_for_every_tensor(chain: list[EditPlan]) -> None:
    first, second = chain
    first.check(SOURCE)
    second.check(_specs(first))
    composed = compose(first, second)
    if _splits_what_was_transformed(chain):
        with pytest.raises(CheckpointError, match="twice"):
            composed.check(SOURCE)
        return
    composed.check(SOURCE)
    used = {name for output in composed.outputs.values() for name in output.sources}
    assert composed.dropped.keys() == SOURCE.keys() - used


@given(chains(3))
@settings(max_examples=100)
def test_composing_is_associative(chain: list[EditPlan]) -> None:
    first, second, third = chain
    left, right = compose(compose(first, second), third), compose(first, compose(second, third))
    source = _bytes(SOURCE)
    assert _done(left, source) == _done(right, source)
    assert left.dropped.keys() == right.dropped.keys()
    assert left.config == right.config
    assert {name: out.verb for name, out in left.outputs.items()} == {n: o.verb for n, o in right.outputs.items()}


@given(plans(SOURCE, "new"))
def test_doing_nothing_before_or_after_changes_nothing(plan: EditPlan) -> None:
    nothing = EditPlan({name: edits.copy(spec) for name, spec in SOURCE.items()})
    nothing_after = EditPlan({name: edits.copy(spec) for name, spec in _specs(plan).items()})
    assert nothing.changes_nothing
    for same in (compose(nothing, plan), compose(plan, nothing_after)):
        assert _done(same, _bytes(SOURCE)) == _done(plan, _bytes(SOURCE))
        assert {name: out.verb for name, out in same.outputs.items()} == {n: o.verb for n, o in plan.outputs.items()}
        assert (same.dropped, same.config, same.record) == (plan.dropped, plan.config, plan.record)
        assert same.changes_nothing is plan.changes_nothing


@given(st.sets(st.integers(0, 5), min_size=1).map(sorted))
def test_what_is_made_anew_is_made_once_however_it_is_cut(kept: list[int]) -> None:
    made: list[str] = []

    def load() -> bytes:
        made.append("router")
        return bytes(range(ROUTER.nbytes))

    first = EditPlan({**_identity(), "router": edits.replace(ROUTER, load, key="counted")})
    second = EditPlan({**_identity(), "router": edits.select(ROUTER, 0, kept)})
    rows = [bytes(range(ROUTER.nbytes))[row * 6 : row * 6 + 6] for row in kept]
    assert _done(compose(first, second), _bytes(SOURCE))["router"] == b"".join(rows)
    assert made == ["router"]


@given(st.sets(st.integers(0, 5), min_size=1).map(sorted), st.data())
def test_selecting_twice_is_selecting_once(outer: list[int], data: st.DataObject) -> None:
    inner = data.draw(st.sets(st.integers(0, len(outer) - 1)).map(sorted))
    for name, axis in (("router", 0), ("fused", 0), ("columns", 1)):
        first = edits.select(SOURCE[name], axis, outer)
        table = {name: first.spec}
        twice = compose(EditPlan({name: first}), EditPlan({name: edits.select(table[name], axis, inner)}))
        once = EditPlan({name: edits.select(SOURCE[name], axis, [outer[index] for index in inner])})
        assert _specs(twice) == _specs(once)
        assert _done(twice, _bytes(SOURCE)) == _done(once, _bytes(SOURCE))


def _without(name: str) -> dict[str, Output]:
    return {key: output for key, output in _identity().items() if key != name}


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (EditPlan(_without("norm")), "'norm' is forgotten"),
        (EditPlan(_identity(), {"norm": "why not"}), "'norm' is both used and dropped"),
        (EditPlan(_identity(), {"nothing": "why not"}), "'nothing' is unknown"),
        (EditPlan({**_identity(), "x": edits.rename(edits.copy(ROUTER), "x")}), "uses bytes of 'router' twice"),
        (EditPlan({**_identity(), "x": edits.split(FUSED, "x", 40, 48, (8,))}), "uses bytes of 'fused' twice"),
        (EditPlan({**_identity(), "fused": edits.select(FUSED, 0, [1, 1])}), "uses bytes of 'fused' twice"),
        (EditPlan({**_without("fused"), "x": edits.copy(TensorSpec("x", "U8", (1,)))}), "'x' is unknown"),
        (
            EditPlan({**_identity(), "norm": edits.copy(TensorSpec("norm", "F32", (6,)))}),
            "reads past the end of 'norm'",
        ),
        (
            EditPlan({**_identity(), "norm": with_fields(edits.copy(SOURCE["norm"]), parts=())}),
            "fills 'norm' with the wrong number of bytes",
        ),
    ],
)
def test_a_plan_that_does_not_add_up_is_refused(plan: EditPlan, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        plan.check(SOURCE)


def test_bytes_used_twice_inside_a_derived_part_are_found() -> None:
    twice = edits.transform(ROUTER, _reversed)
    plan = EditPlan({**_identity(), "x": with_fields(twice, spec=TensorSpec("x", "BF16", (6, 3)))})
    with pytest.raises(CheckpointError, match="uses bytes of 'router' twice"):
        plan.check(SOURCE)


def test_the_same_range_twice_is_found_also_when_it_is_one_object() -> None:
    half = Slice("norm", 0, SOURCE["norm"].nbytes // 2)
    plan = EditPlan({**_identity(), "norm": with_fields(edits.copy(SOURCE["norm"]), parts=(half, half))})
    with pytest.raises(CheckpointError, match="uses bytes of 'norm' twice"):
        plan.check(SOURCE)


def test_a_config_edit_keeps_order_and_unknown_keys() -> None:
    plan = EditPlan({}, config={"b": 5, "gone": REMOVED, "new": None, "absent": REMOVED})
    edited = plan.edited_config({"z": 1, "b": 2, "gone": 3, "a": [4]})
    assert list(edited.items()) == [("z", 1), ("b", 5), ("a", [4]), ("new", None)]


def test_a_summary_counts_what_happens() -> None:
    outputs = {**_without("norm"), "fused": edits.select(FUSED, 0, [0, 2])}
    plan = EditPlan(outputs, {"norm": "why not"}, {"k": 1, "gone": REMOVED}, [{"operation": "prune"}])
    assert plan.summary() == {
        "tensors": {"copy": 4, "select": 1},
        "dropped": {"why not": 1},
        "config": {"k": 1, "gone": None},
        "files": [],
        "bytes": sum(spec.nbytes for spec in SOURCE.values()) - SOURCE["norm"].nbytes - 32,
        "operations": [{"operation": "prune"}],
    }


def test_what_an_added_tensor_lies_beside_can_be_dropped_later() -> None:
    """It says where the new one is stored, not what it is made of: the drop must be told, and be legal."""
    extra = TensorSpec("extra", "U8", (2,))
    first = EditPlan({**_identity(), "extra": edits.add(extra, lambda: b"xy", key="xy", beside="norm")})
    first.check(SOURCE)
    table = _specs(first)
    kept = {name: edits.copy(spec) for name, spec in table.items() if name != "norm"}
    more = edits.add(TensorSpec("more", "U8", (1,)), lambda: b"z", key="z", beside="extra")
    both = compose(first, EditPlan({**kept, "more": more}, {"norm": "not needed"}))
    assert both.dropped == {"norm": "not needed"}
    both.check(SOURCE)
    assert [both.outputs[name].home for name in ("extra", "more")] == ["norm", "norm"]
    gone = compose(first, EditPlan({name: edits.copy(SOURCE[name]) for name in SOURCE}, {"extra": "not wanted"}))
    assert gone.dropped == {} and gone.outputs.keys() == SOURCE.keys()
    gone.check(SOURCE)
    alone = EditPlan({**kept, "extra": edits.add(extra, lambda: b"xy", key="xy", beside="norm")})
    with pytest.raises(CheckpointError, match="'norm' is forgotten"):
        alone.check(SOURCE)
    with pytest.raises(CheckpointError, match="'nowhere' is unknown"):
        EditPlan({**_identity(), "extra": edits.add(extra, lambda: b"xy", key="xy", beside="nowhere")}).check(SOURCE)
