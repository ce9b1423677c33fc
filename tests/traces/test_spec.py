import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.errors import MoeSurgeonError, TraceError, UsageError
from moesurgeon.traces.builtin import BUILTIN_TRACES
from moesurgeon.traces.spec import TraceSpec, parse_trace, parse_traces


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder whose file names contain everything that the syntax uses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "chat.jsonl", "chat.v2.jsonl.gz", "wiki.txt", "part.parquet", "a:b.jsonl", "my chat.jsonl",
        "v1.5/x.txt", "lang=de/part.parquet", "name=chat.jsonl",
    ):  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()


@pytest.mark.parametrize(
    ("text", "domain", "location", "column"),
    [
        ("builtin:python", "python", "builtin:python", None),
        ("code=builtin:python", "code", "builtin:python", None),
        ("chat.jsonl", "chat", "chat.jsonl", None),
        ("./chat.jsonl:text", "chat", "chat.jsonl", "text"),
        ("x=chat.jsonl", "x", "chat.jsonl", None),
        ("x=chat.jsonl:messages", "x", "chat.jsonl", "messages"),
        ("chat.v2.jsonl.gz", "chat.v2", "chat.v2.jsonl.gz", None),
        ("part.parquet:body", "part", "part.parquet", "body"),
        ("v1.5", "v1.5", "v1.5", None),
        ("x=v1.5:messages", "x", "v1.5", "messages"),
        # Colons, equals signs and blanks that are part of a path.
        ("x=a:b.jsonl", "x", "a:b.jsonl", None),
        ("x=a:b.jsonl:text", "x", "a:b.jsonl", "text"),
        ("x=my chat.jsonl", "x", "my chat.jsonl", None),
        ("lang=de/part.parquet:text", "part", "lang=de/part.parquet", "text"),
        ("x=lang=de/part.parquet", "x", "lang=de/part.parquet", None),
        ("y=name=chat.jsonl", "y", "name=chat.jsonl", None),
    ],
)
def test_the_forms_of_a_trace(text: str, domain: str, location: str, column: str | None) -> None:
    assert parse_trace(text) == TraceSpec(domain=domain, location=location, column=column)


def test_a_tilde_after_the_name_is_the_home_folder(tmp_path: Path) -> None:
    assert parse_trace("x=~/chat.jsonl:text").location == str(tmp_path / "chat.jsonl")


def test_the_current_folder_has_its_own_name(tmp_path: Path) -> None:
    assert parse_trace("./v1.5/..").location == "v1.5/.."
    assert parse_trace("x=.").domain == "x"
    # pytest's folder names may hold anything, so only one that is made here is compared.
    assert parse_trace(f"{tmp_path}/v1.5").domain == "v1.5"


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("builtin:nope", UsageError, "python, prose, .*all"),
        ("builtin:python:text", UsageError, "no builtin trace 'python:text'"),
        ("x=builtin:all", UsageError, "leave out NAME="),
        ("my chat.jsonl", UsageError, "NAME=my chat.jsonl"),
        ("bad name=chat.jsonl", UsageError, "'bad name' cannot be"),
        ("=chat.jsonl", UsageError, "'' cannot be"),
        ("a/b=chat.jsonl", UsageError, "'a/b' cannot be"),
        ("chat.jsonl:", UsageError, "PATH:COLUMN"),
        ("all=chat.jsonl", UsageError, "'all' cannot be .*tables.*NAME=chat.jsonl"),
        ("long-context=chat.jsonl", UsageError, "'long-context' cannot be .*--protect.*NAME=chat.jsonl"),
        ("gone.jsonl", TraceError, "gone.jsonl"),
        ("x=gone.jsonl:text", TraceError, "gone.jsonl"),
        ("hf://org/name", TraceError, "hf://org/name"),
        ("", TraceError, "no such file"),
        ("x=", TraceError, "no such file"),
        (":text", TraceError, "no such file"),
    ],
)
def test_what_cannot_be_a_trace_is_one_line(text: str, error: type[MoeSurgeonError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        parse_trace(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=300))
def test_any_text_is_a_trace_or_an_error_of_ours(text: str) -> None:
    try:
        spec = parse_trace(text)
    except MoeSurgeonError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", spec.domain)


def test_all_stands_for_every_builtin_in_place() -> None:
    domains = [spec.domain for spec in parse_traces(["chat.jsonl", "builtin:all", "wiki.txt"])]
    assert domains == ["chat", *BUILTIN_TRACES, "wiki"]
    assert parse_traces([]) == ()


@pytest.mark.parametrize(
    "texts",
    [["builtin:all", "builtin:json"], ["chat.jsonl:text", "./chat.jsonl:code"], ["x=v1.5", "x=wiki.txt"]],
)
def test_two_traces_of_one_name_need_names(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="NAME=") as caught:
        parse_traces(texts)
    assert "\n" not in str(caught.value)


def test_a_star_stands_for_each_entry_of_a_folder(tmp_path: Path) -> None:
    for name in ("kinds/code/a.jsonl", "kinds/chat/b.txt", "kinds/logs.jsonl", "kinds/.hidden/c.txt", "kinds/README.md",
                 "kinds/info.json", "kinds/notes.pdf"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    specs = parse_traces([f"{tmp_path}/kinds/*", "builtin:json"])
    assert [spec.domain for spec in specs] == ["chat", "code", "logs", "json"]
    assert specs[1].location == str(tmp_path / "kinds" / "code")
    assert {spec.column for spec in parse_traces([f"{tmp_path}/kinds/*:body"])} == {"body"}
    with pytest.raises(UsageError, match="several domains and cannot have one name: leave out NAME="):
        parse_traces([f"x={tmp_path}/kinds/*"])
    with pytest.raises(TraceError, match="gone: no such folder"):
        parse_traces([f"{tmp_path}/gone/*"])
    (tmp_path / "kinds" / "logs").mkdir()
    with pytest.raises(UsageError, match="two traces are called 'logs'"):
        parse_traces([f"{tmp_path}/kinds/*"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match="empty: a folder without traces"):
        parse_traces([f"{tmp_path}/empty/*"])
