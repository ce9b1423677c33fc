"""A header is untrusted input: it is understood as the safetensors library does, or refused with a reason."""

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from moesurgeon.checkpoint.header import MAX_HEADER_BYTES, TensorSpec, build_header, parse_json, read_header
from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.checkpoint.reader import ShardReader, fingerprint
from moesurgeon.errors import CheckpointError
from tests.checkpoint.shards import put_together, save_raw, taken_apart, valid_shard

VALID = valid_shard()
HEADER, DATA = taken_apart(VALID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that hypothesis may write to again and again."""
    return tmp_path_factory.mktemp("header")


def _survives(folder: Path, raw: bytes) -> None:
    """Open ``raw``: refused in one short line, or every promise of its header kept."""
    save_raw(folder, raw)
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    with ShardReader(checkpoint) as reader:
        for tensor in checkpoint.tensors.values():
            assert len(reader.read(tensor)) == tensor.nbytes
    assert len(fingerprint(checkpoint)) == 64
    header = read_header(folder / "model.safetensors", "model.safetensors")
    length = struct.unpack("<Q", raw[:8])[0]
    again = build_header(header.tensors, header.metadata) + raw[8 + length :]
    assert deserialize(again) is not None, "the safetensors library cannot read what we would write"


def test_a_valid_shard_is_read_as_the_library_reads_it(folder: Path) -> None:
    checkpoint = open_checkpoint(save_raw(folder, VALID))
    expected = {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in deserialize(VALID)
    }
    with ShardReader(checkpoint) as reader:
        found = {name: (spec.dtype, spec.shape, reader.read(spec)) for name, spec in checkpoint.tensors.items()}
    assert found == expected
    assert checkpoint.headers["model.safetensors"].metadata == {"format": "pt"}


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=300)
def test_any_bytes_changed(folder: Path, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(VALID)
    for position, value in changes:
        raw[position] = value
    _survives(folder, bytes(raw))


@given(st.lists(st.tuples(st.integers(0, len(VALID) - len(DATA) - 1), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=300)
def test_any_bytes_of_the_header_changed(folder: Path, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(VALID)
    for position, value in changes:
        raw[position] = value
    _survives(folder, bytes(raw))


@given(st.integers(0, len(VALID)))
@example(0)
@example(7)
@example(8)
def test_a_shard_cut_anywhere_is_refused(folder: Path, length: int) -> None:
    save_raw(folder, VALID[:length])
    if length == len(VALID):
        assert len(open_checkpoint(folder).tensors) == 6
        return
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(folder)


SIZES = st.integers(-3, 70) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30])
SCALARS = st.none() | st.booleans() | SIZES | st.floats() | st.text(st.characters(), max_size=4) | st.just("\ud800")
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted(HEADER)
FIELDS = ["dtype", "shape", "data_offsets", "extra"]


@given(st.sampled_from(NAMES), st.sampled_from([None, *FIELDS]), JSON | st.lists(SIZES, max_size=40))
@settings(max_examples=400)
@example("t0", "shape", [2**62] * 40)  # more bytes than a float can count
@example("t0", "shape", [1] * 65)
@example("t0", "dtype", ["BF16"])
@example("t0", "data_offsets", [2**63 - 1, 2**63 - 1])
@example("__metadata__", None, {"format": 1})
@example("__metadata__", None, {"format": "\ud800"})
@example("t4", "shape", [0, 2**62, 2**62])
@example("t4", "shape", [2**62, 2**62, 0])
@example("t4", "shape", [2**31, 2**32, 0])
def test_any_part_of_the_header_replaced(folder: Path, name: str, field: str | None, value: Any) -> None:
    header = copy.deepcopy(HEADER)
    if field is None or name == "__metadata__":
        header[name] = value
    else:
        header[name][field] = value
    _survives(folder, put_together(header, DATA))


@given(st.text(st.characters(exclude_categories=()), max_size=10))
@example("\ud800")
@example("__metadata__")
@example("\x00")
@example("../../etc/passwd")
def test_any_name_of_a_tensor(folder: Path, name: str) -> None:
    header = copy.deepcopy(HEADER)
    header[name] = header.pop("t0")
    _survives(folder, put_together(header, DATA))


def _moved(name: str, by: int) -> dict[str, Any]:
    header = copy.deepcopy(HEADER)
    header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]
    return header


def _with(name: str, **fields: Any) -> dict[str, Any]:
    header = copy.deepcopy(HEADER)
    header[name] |= fields
    return header


_BY_OFFSET = sorted((name for name in HEADER if name != "__metadata__"), key=lambda name: HEADER[name]["data_offsets"])
_FULL = [name for name in _BY_OFFSET if len(set(HEADER[name]["data_offsets"])) == 2]
LAST, FIRST = _FULL[-1], _FULL[0]


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (_moved(LAST, -1), "overlaps the tensor before it"),
        (_moved(LAST, 1), "leaves a hole before it"),
        (_moved(FIRST, 1), "leaves a hole before it"),
        (_moved(FIRST, -1), "not sizes"),
        (_with(LAST, data_offsets=HEADER[LAST]["data_offsets"][::-1]), "bytes, but its shape needs"),
        (_with(LAST, data_offsets=HEADER[FIRST]["data_offsets"]), "bytes, but its shape needs|overlaps"),
        (_with("t0", shape=[2**62, 2**62]), "more than 64 bits hold"),
        (_with("t0", shape=[2**63]), "shape or offsets that are not sizes"),
        (_with("t0", shape=[True, 32]), "shape or offsets that are not sizes"),
        (_with("t0", shape=[8.0, 4.0]), "shape or offsets that are not sizes"),
        (_with("t0", shape=[1] * 65), "shape or offsets that are not sizes"),
        (_with("t0", shape="84"), "shape or offsets that are not sizes"),
        (_with("t0", dtype="F128"), "unknown dtype 'F128'"),
        (_with("t0", dtype=None), "unknown dtype"),
        ({**HEADER, "t0": []}, "something that is not an object"),
        ({**HEADER, "__metadata__": {"format": 1}}, "not a map of strings"),
        ({**HEADER, "__metadata__": []}, "not a map of strings"),
        ([], "not a JSON object"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (json.dumps(HEADER).encode("utf-16"), "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"t0":{},"t0":{}}', "names the same key twice"),
        (json.dumps(HEADER).replace('"dtype":', '"dtype":"F32","dtype":', 1).encode(), "names the same key twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, header: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(save_raw(folder, put_together(header, DATA)))


def test_bytes_that_belong_to_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="bytes that belong to no tensor"):
        open_checkpoint(save_raw(folder, VALID + b"\0"))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**40, 2**64 - 1])
def test_a_giant_header_is_not_read(tmp_path: Path, length: int) -> None:
    with (save_raw(tmp_path, b"") / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse: takes no space
    with pytest.raises(CheckpointError, match=r"claims a header of|truncated"):
        open_checkpoint(tmp_path)


SPECS = st.lists(
    st.builds(
        TensorSpec,
        name=st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda name: name != "__metadata__"),
        dtype=st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "I64"]),
        shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    ),
    unique_by=lambda spec: spec.name,
    max_size=6,
)


@given(SPECS, st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), st.text(max_size=5), max_size=2))
def test_what_is_built_reads_back(folder: Path, specs: list[TensorSpec], metadata: dict[str, str]) -> None:
    raw = build_header(specs, metadata)
    assert len(raw) % 8 == 0
    raw += bytes(sum(spec.nbytes for spec in specs))
    header = read_header(save_raw(folder, raw) / "model.safetensors", "model.safetensors")
    found = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in header.tensors]
    # Where several have no bytes, their order is not in the file.
    assert sorted(found, key=lambda spec: spec.name) == sorted(specs, key=lambda spec: spec.name)
    assert [spec for spec in found if spec.nbytes] == [spec for spec in specs if spec.nbytes]
    assert header.metadata == metadata
    assert {name for name, _ in deserialize(raw)} == {spec.name for spec in specs}


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"\\udfff": 1}', '{"a": ["x", {"b": "\\udc00\\ud800"}]}'])
def test_half_a_character_is_refused(text: str) -> None:
    """It could be parsed, but never written again as UTF-8."""
    with pytest.raises(CheckpointError, match="not valid JSON"):
        parse_json(text.encode(), "config.json")
    assert parse_json(b'{"a": "\\ud83d\\ude42"}', "config.json") == {"a": "🙂"}
