import json
from pathlib import Path

import pytest

from moesurgeon.errors import TraceError
from moesurgeon.traces.documents import SPLITS
from moesurgeon.traces.duplicates import counted_once, refuse_overlap
from moesurgeon.traces.spec import parse_traces
from moesurgeon.traces.windows import Corpus, load_corpus


def _words(texts: list[str], *, special: bool = True) -> list[list[int]]:
    return [list(range(len(text.split()))) for text in texts]


def _corpus(*specs: str, max_tokens: int | None = None) -> Corpus:
    parsed = parse_traces(specs)
    return load_corpus(parsed, _words, splits=["all"] * len(parsed), length=16, max_tokens=max_tokens)


def _write(path: Path, numbers: range) -> Path:
    rows = [json.dumps({"text": f"document {number} " + "word " * 30}) + "\n" for number in numbers]
    path.write_text("".join(rows))
    return path


def test_a_few_shared_documents_count_in_the_first_domain_alone(tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a.jsonl", range(400)), _write(tmp_path / "b.jsonl", range(398, 1000))
    apart = _corpus(str(a))
    found = counted_once(_corpus(str(a), str(b)))
    assert found.notes == ("2 documents of b are in a as well: they count there alone",)
    assert found.documents["a"] == apart.documents["a"]
    assert len(found.documents["b"]) == 600 and not set(found.documents["a"]) & set(found.documents["b"])
    for domain in ("a", "b"):
        mine = [window for window in found.windows if window.domain == domain]
        assert sorted({window.document for window in mine}) == list(range(len(found.documents[domain])))
        assert found.tokens[domain] == sum(len(window.tokens) for window in mine)
    assert found.catalogues["b"].places[0].endswith("b.jsonl, line 3")


@pytest.mark.parametrize("shared", [1, 5, 20])
def test_a_text_under_two_names_is_refused(shared: int, tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a.jsonl", range(20)), _write(tmp_path / "b.jsonl", range(20 - shared, 100))
    says = (
        rf"^{shared} of the {80 + shared} documents of b are in a as well \(as .*b.jsonl, line 1\): .* twice; .*[^.]$"
    )
    with pytest.raises(TraceError, match=says):
        counted_once(_corpus(str(a), str(b)))


def test_a_book_is_the_same_as_a_file_of_a_folder_and_alone(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    book = "\n\n".join(f"paragraph {number} " + "word " * 400 for number in range(20))
    (folder / "a.txt").write_text(book)
    (folder / "b.txt").write_text("another " * 30)
    (tmp_path / "lone.txt").write_text(book)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": book}))
    for other in ("lone.txt", "rows.jsonl"):
        with pytest.raises(TraceError, match=r"of (lone|rows) are in books as well"):
            counted_once(_corpus(str(folder), str(tmp_path / other)))
        with pytest.raises(
            TraceError, match=r"validation documents of books are in the calibration text of (lone|rows)"
        ):
            refuse_overlap(_corpus(str(tmp_path / other)), _corpus(str(folder)))


@pytest.mark.parametrize("split", SPLITS)
def test_no_builtin_text_is_in_two_domains(split: str) -> None:
    parsed = parse_traces(["builtin:all"])
    corpus = load_corpus(parsed, _words, splits=[split] * len(parsed), length=512, max_tokens=200_000)  # type: ignore[list-item]
    once = counted_once(corpus)
    assert once.notes == () and once.documents == corpus.documents and once.windows == corpus.windows


def test_what_heals_does_not_judge(tmp_path: Path) -> None:
    heal, judge = _write(tmp_path / "heal.jsonl", range(50)), _write(tmp_path / "judge.jsonl", range(50, 60))
    refuse_overlap(_corpus(str(heal)), _corpus(str(judge)))
    judge = _write(tmp_path / "judge.jsonl", range(48, 60))
    says = r"^2 of the 12 validation documents of judge are in the calibration text of heal .*, line 1 is .*line 49"
    with pytest.raises(TraceError, match=says):
        refuse_overlap(_corpus(str(heal)), _corpus(str(judge)))
    # What is beyond the budget heals nothing.
    refuse_overlap(_corpus(str(heal), max_tokens=320), _corpus(str(judge)))


def test_copies_in_one_domain_are_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"document {number % 3} " + "word " * 30}) + "\n" for number in range(12)]
    path.write_text("".join(rows))
    corpus = counted_once(_corpus(str(path)))
    assert len(corpus.documents["a"]) == 3
    assert {window.document for window in corpus.windows} == {0, 1, 2}


def test_white_space_makes_no_other_document(tmp_path: Path) -> None:
    heals, judges = tmp_path / "heals.jsonl", tmp_path / "judges.jsonl"
    text = "def f(x):\n    return x\n" * 12
    heals.write_text(json.dumps({"text": text}) + "\n")
    judges.write_text(json.dumps({"text": text.replace("\n", "\r\n").replace("    ", "\t") + "\n"}) + "\n")
    with pytest.raises(TraceError, match="what heals cannot judge"):
        refuse_overlap(_corpus(str(heals)), _corpus(str(judges)))
