import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesurgeon.errors import TraceError
from moesurgeon.traces import formats
from moesurgeon.traces.dealing import deal
from moesurgeon.traces.documents import SPLITS, Split
from moesurgeon.traces.sources import Reading, read_documents
from moesurgeon.traces.spec import TraceSpec
from moesurgeon.traces.texts import text_of


def _texts() -> list[str]:
    """Return 80 distinct texts of 4000 to 5000 characters: plain text keeps each a document."""
    rng = random.Random(0)
    words = ["router", "expert", "naïve", "日本語", "🙂", "tab\there", "line\nbreak", '"quoted"']
    return [f"{i} " + " ".join(rng.choices(words, k=620)).ljust(4000, "x") for i in range(80)]


TEXTS = _texts()


def _json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def _jsonl(path: Path) -> Path:
    path.with_suffix(".jsonl").write_bytes(_json_lines(TEXTS))
    return path.with_suffix(".jsonl")


def _jsonl_gz(path: Path) -> Path:
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(_json_lines(TEXTS)))
    return path.with_suffix(".jsonl.gz")


def _txt(path: Path) -> Path:
    path.with_suffix(".txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    return path.with_suffix(".txt")


def _windows_txt_gz(path: Path) -> Path:
    text = "\ufeff" + "\n\n".join(TEXTS).replace("\n", "\r\n")
    path.with_suffix(".txt.gz").write_bytes(gzip.compress(text.encode()))
    return path.with_suffix(".txt.gz")


def _parquet(path: Path) -> Path:
    pq.write_table(pa.table({"text": TEXTS, "id": range(80)}), path.with_suffix(".parquet"), row_group_size=30)
    return path.with_suffix(".parquet")


def _arrow(path: Path, kind: Any = pa.ipc.new_stream) -> Path:
    table = pa.table({"text": TEXTS, "id": range(80)})
    with kind(str(path.with_suffix(".arrow")), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return path.with_suffix(".arrow")


def _arrow_file(path: Path) -> Path:
    return _arrow(path, pa.ipc.new_file)


def _dataset(path: Path) -> Path:
    # In numpy format: how it was formatted when it was saved must not matter.
    datasets.Dataset.from_dict({"text": TEXTS}).with_format("numpy").save_to_disk(path, num_shards=2)
    return path


def _dataset_dict(path: Path) -> Path:
    datasets.DatasetDict({"only": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(path)
    return path


def _folder(path: Path) -> Path:
    (path / "data").mkdir(parents=True)
    (path / "data" / "part-0.jsonl").write_bytes(_json_lines(TEXTS[:30]))
    pq.write_table(pa.table({"text": TEXTS[30:]}), path / "data" / "part-1.parquet")
    (path / "README.md").write_text("about the data")
    (path / "info.json").write_text("{}")
    (path / ".cache").mkdir()
    (path / ".cache" / "old.txt").write_text("left over")
    return path


@pytest.mark.parametrize(
    "write", [_jsonl, _jsonl_gz, _txt, _windows_txt_gz, _parquet, _arrow, _arrow_file, _dataset, _dataset_dict, _folder]
)
def test_every_format_gives_the_same_documents_and_splits(write: Callable[[Path], Path], tmp_path: Path) -> None:
    spec = TraceSpec(domain="d", location=str(write(tmp_path / "trace")))
    documents = list(read_documents(spec, "all"))
    assert [document.text for document in documents] == TEXTS
    splits = deal(document.key for document in documents)
    for split in SPLITS:
        expected = [document for document in documents if split in (splits[document.key], "all")]
        assert list(read_documents(spec, split)) == expected


def test_the_same_text_is_in_one_split_wherever_it_is_from(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(_json_lines([*TEXTS[:40], *TEXTS[:40]]))
    spec = TraceSpec(domain="d", location=str(tmp_path))
    splits: tuple[Split, ...] = ("train", "calibration", "validation", "report")
    counts = [len(list(read_documents(spec, split))) for split in splits]
    assert sum(counts) == 160
    assert all(count % 4 == 0 for count in counts)


def test_columns_and_chats(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [
        {
            "prompt": "p",
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
        },
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "look"}]}]},
        {"messages": None},
        {"messages": []},
        {"messages": "  "},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    chats = ["user: hi\nassistant: yo", "user: look"]
    spec = TraceSpec(domain="d", location=str(path))
    assert [document.text for document in read_documents(spec, "all")] == chats

    pq.write_table(pa.table({"turns": [row["messages"] for row in rows[:1]]}), tmp_path / "chat.parquet")
    spec = TraceSpec(domain="d", location=str(tmp_path / "chat.parquet"), column="turns")
    assert [document.text for document in read_documents(spec, "all")] == chats[:1]


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert text_of(json.loads(r'"a\ud83d b \ud83d\ude42"')) == "a\ufffd b 🙂"


@pytest.mark.parametrize("value", [3, {"a": 1}, [1], [{"role": "user"}], [{"role": "user", "content": 3}]])
def test_what_is_no_text_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match=r"where|whose"):
        text_of(value)


def test_paragraphs_make_documents_of_some_4000_characters(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"paragraph {i} " + "word " * 50 for i in range(200)]
    path.write_text("\n\n".join(paragraphs) + "\n")
    texts = [document.text for document in read_documents(TraceSpec(domain="d", location=str(path)), "all")]
    assert "\n\n".join(texts) == "\n\n".join(paragraphs)
    assert all(4000 <= len(text) < 4500 for text in texts[:-1])


def test_text_without_any_line_break_is_cut_within_no_character(tmp_path: Path) -> None:
    path = tmp_path / "flat.txt"
    path.write_text("日本語x" * 20_000, encoding="utf-8")
    texts = [document.text for document in read_documents(TraceSpec(domain="d", location=str(path)), "all")]
    assert "".join(texts) == "日本語x" * 20_000
    assert max(map(len, texts)) <= 32_000


def test_a_trace_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "%s"}\n' % (b"x" * 20_000) * 2000))  # 40 MB
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_documents(TraceSpec(domain="d", location=str(path)), "all")) == 2000
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def _bad(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _broken_dataset(folder: Path) -> Path:
    path = _dataset(folder / "saved")
    (path / "state.json").write_text("{}")
    return path


def _two_splits(folder: Path) -> Path:
    dataset = datasets.Dataset.from_dict({"text": TEXTS[:2]})
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder / "saved")
    return folder / "saved"


def _cut_parquet(folder: Path) -> Path:
    """Write a parquet file with its footer in place but its pages overwritten."""
    path = _parquet(folder / "cut")
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    path.write_bytes(content)
    return path


GOOD_LINE = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_bad("x.jsonl", GOOD_LINE + b'{"text": "cut'), r"x\.jsonl, line 2: not JSON"),
        (_bad("x.jsonl", GOOD_LINE + b"[" * 100_000), r"x\.jsonl, line 2: not JSON"),
        (_bad("x.json", b'[\n{"text": "an array"}\n]'), r"x\.json, line 1: not JSON.*jq"),
        (_bad("x.jsonl", b'["a", "b"]\n'), r"x\.jsonl, line 1: list where an object"),
        (_bad("x.jsonl", GOOD_LINE + b'{"body": "b"}\n'), r"x\.jsonl, line 2: no column text.*\(body\)"),
        (_bad("x.jsonl", b"{}\n"), r"x\.jsonl, line 1: no column text or content.*\(none\)"),
        (_bad("x.jsonl", b'{"text": 3}\n'), r"x\.jsonl, line 1: int where a text"),
        (_bad("x.jsonl", GOOD_LINE + b'{"text": "\xff"}\n'), r"x\.jsonl, line 2: not UTF-8"),
        (_bad("x.txt", b"one\ntwo\n\xff\n"), r"x\.txt, line 3: not UTF-8"),
        (_bad("x.txt", "one\ntwo".encode("utf-16")), r"x\.txt, line 1: not UTF-8"),
        (_bad("x.txt", b"one\n\xe6\x97"), r"x\.txt, line 2: ends within a character"),
        (_bad("x.jsonl.gz", GOOD_LINE), r"x\.jsonl\.gz, after line 0: cannot be read"),
        (_bad("x.jsonl.gz", gzip.compress(GOOD_LINE * 9)[:-9]), r"x\.jsonl\.gz, after line \d: cannot"),
        (_bad("x.txt.gz", gzip.compress(_json_lines(TEXTS))[:900]), r"x\.txt\.gz, after line"),
        (_bad("x.parquet", b"PAR1 but not really PAR1"), r"x\.parquet.*cannot be read"),
        (_bad("x.parquet", b""), r"x\.parquet.*cannot be read"),
        (_bad("x.arrow", b""), r"x\.arrow, after row 0: cannot be read"),
        (_bad("x.arrow", b"ARROW1 but not really"), r"x\.arrow, after row 0: cannot be read"),
        (_bad("x.csv", b"text\n"), r"x\.csv: not a kind of file.*\.jsonl"),
        (_bad("x.pkl", b"text\n"), r"x\.pkl: not a kind of file"),
        (_cut_parquet, r"cut\.parquet.*cannot be read"),
        (_broken_dataset, r"saved: cannot be read"),
        (_two_splits, r"saved: holds 2 splits \(train, test\): choose one, as in .*saved/NAME"),
        (lambda folder: folder, "a folder without traces"),
        (lambda folder: folder / "gone", "gone: no such file"),
    ],
)  # fmt: skip
def test_bad_traces_are_errors_of_one_line_with_the_place(
    write: Callable[[Path], Path], says: str, tmp_path: Path
) -> None:
    _assert_error(TraceSpec(domain="d", location=str(write(tmp_path))), says)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_jsonl, r"x\.jsonl, line 1: no column body: .*\(id, text\)"),
        (_parquet, r"x\.parquet: no column body: .*\(text, id\)"),
        (_arrow, r"x\.arrow: no column body: .*\(text, id\)"),
        (_dataset, r"x: no column body: .*\(text\)"),
        (_txt, r"x\.txt: plain text has no column 'body'"),
    ],
)
def test_a_missing_column_names_those_that_are_there(write: Callable[[Path], Path], says: str, tmp_path: Path) -> None:
    _assert_error(TraceSpec(domain="d", location=str(write(tmp_path / "x")), column="body"), says)


def test_a_json_line_without_end_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_LONGEST_LINE", 1000)
    (tmp_path / "x.jsonl").write_bytes(GOOD_LINE + b'{"text": "%s"}\n' % (b"x" * 1000))
    _assert_error(TraceSpec(domain="d", location=str(tmp_path / "x.jsonl")), r"line 2: longer than 64 MiB")


def _assert_error(spec: TraceSpec, says: str) -> None:
    with pytest.raises(TraceError, match=says) as caught:
        list(read_documents(spec, "all"))
    assert "\n" not in str(caught.value)


def test_a_reading_hashes_what_was_consumed(tmp_path: Path) -> None:
    spec = TraceSpec(domain="d", location=str(_jsonl(tmp_path / "x")))
    whole, again, part = (Reading(read_documents(spec, "all")) for _ in range(3))
    assert [document.text for document in whole] == TEXTS
    assert len(list(again)) == 80
    next(iter(part))
    assert whole.sha256 == again.sha256 != part.sha256
