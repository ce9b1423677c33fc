"""``verify`` finds an edited config and a forged, damaged or senseless record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import InputError, OutputError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from tests.surgery.verified import copied, forge


def test_an_edited_result_or_record_is_found_without_the_source(pruned: Path, tmp_path: Path) -> None:
    def last(record: Any) -> Any:
        return record["history"][-1]

    def no_result(record: Any) -> Any:
        del last(record)["result"]
        return record

    def other_count(record: Any) -> Any:
        last(record)["operations"][1]["experts"]["after"] = 5
        return no_result(record)

    def broken_chain(record: Any) -> Any:
        return {**record, "history": [last(record), last(record)]}

    for number, (change, says) in enumerate(
        (
            (broken_chain, "do not follow each other"),
            (other_count, "ends with experts 5, config.json says 4"),
        )
    ):
        folder = copied(pruned, tmp_path / str(number))
        forge(folder, change)
        with pytest.raises(OutputError, match=says):
            verify(str(folder))
    folder = copied(pruned, tmp_path / "config")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(OutputError, match=r"config\.json was changed after"):
        verify(str(folder))
    forge(folder, no_result)  # a record of an earlier version says nothing about it
    verify(str(folder))


@pytest.mark.parametrize(
    "config",
    [{"num_experts_per_tok": 2}, {"rope_theta": 1.0}, {"hidden_act": "relu"}, {"new": None}, {"rms_norm_eps": 1}],
)
def test_an_edited_config_is_found(source: Subject, pruned: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = copied(pruned, tmp_path / "out")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | config))
    with pytest.raises(OutputError, match=f"another {next(iter(config))} in config.json"):
        verify(str(folder), str(source.root))


def _operations(record: Any) -> Any:
    return record["history"][0]["operations"]


def _other_experts(record: Any) -> Any:
    _operations(record)[1]["expert_map"]["2"] = {str(old): new for new, old in enumerate((0, 2, 4, 7))}
    return record


def _no_prune(record: Any) -> Any:
    del _operations(record)[1]
    return record


def _no_retop(record: Any) -> Any:
    del _operations(record)[0]
    return record


@pytest.mark.parametrize(
    ("forgery", "says"),
    [
        (_other_experts, r"layers.2.*differs from"),
        (_no_prune, "holds other tensors than its record makes"),
        (_no_retop, "another num_experts_per_tok in config.json"),
    ],
)
def test_a_forged_record_is_found(
    source: Subject, pruned: Path, tmp_path: Path, forgery: Callable[[Any], Any], says: str
) -> None:
    folder = copied(pruned, tmp_path / "out")
    forge(folder, forgery)
    with pytest.raises(OutputError, match=says):
        verify(str(folder), str(source.root))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([], "not a JSON object"),
        ({}, "holds no history"),
        ({"history": 1}, "holds no history"),
        ({"history": [1]}, "holds no history"),
        ({"history": [{"source": {}, "operations": 1}]}, "holds no history"),
        ({"history": [{"source": "x", "operations": []}]}, "holds no history"),
        ({"history": [{"operations": []}]}, "holds no history"),
        ({"history": [{"source": {"fingerprint": ["x"]}, "operations": []}]}, "was not made from"),
        ({"history": []}, "there is no record of a source"),
    ],
)
def test_a_record_without_sense_is_an_input_error(
    source: Subject, pruned: Path, tmp_path: Path, record: Any, says: str
) -> None:
    folder = copied(pruned, tmp_path / "out")
    forge(folder, lambda _: record)
    with pytest.raises(InputError, match=says):
        verify(str(folder), str(source.root))


def test_an_edited_config_is_told_from_an_edited_tensor(source: Subject, pruned: Path, tmp_path: Path) -> None:
    """Adding a key is often meant; that nothing else changed is what one wants to hear."""
    folder = copied(pruned, tmp_path / "out")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "torch_dtype": "float16", "pad_token_id": 0}))
    with pytest.raises(OutputError, match=r"config\.json was changed after .*, the tensors were not; restore it"):
        verify(str(folder))
    with pytest.raises(OutputError, match=r"another pad_token_id, torch_dtype in config\.json.*all its tensors are"):
        verify(str(folder), str(source.root))
    before = open_subject(str(folder))
    tensor = before.checkpoint.tensors["model.norm.weight"]
    with before.checkpoint.path_of(tensor.shard).open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\x01\x02")
    with pytest.raises(OutputError, match=r"a tensor and config\.json was changed after"):
        verify(str(folder))
    with pytest.raises(OutputError, match=r"model\.norm\.weight differs from"):
        verify(str(folder), str(source.root))
    path.write_text(json.dumps(config))
    with pytest.raises(OutputError, match="a tensor was changed after"):
        verify(str(folder))


def test_a_record_without_separate_hashes_is_still_read(pruned: Path, tmp_path: Path) -> None:
    """What was written before config and tensors were hashed apart."""
    folder = copied(pruned, tmp_path / "out")

    def older(record: Any) -> Any:
        record["history"][-1]["result"] = {"fingerprint": record["history"][-1]["result"]["fingerprint"]}
        return record

    forge(folder, older)
    verify(str(folder))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": 1}))
    with pytest.raises(OutputError, match=r"config\.json or a tensor was changed after"):
        verify(str(folder))
