"""Chats by the checkpoint's template: what transformers makes of them, to the byte, and nothing worse than a line."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moesurgeon.errors import CheckpointError, TraceError
from moesurgeon.traces import chat, chat_worker
from moesurgeon.traces.chat import ChatTemplate
from moesurgeon.traces.documents import Document
from moesurgeon.traces.sources import read_documents
from moesurgeon.traces.spec import TraceSpec, parse_traces
from moesurgeon.traces.tokenizer import load_tokenizer
from moesurgeon.traces.windows import load_corpus

CHATML = (
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message.content }}\n"
    "    {{- '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
# As Mixtral's: turns have to alternate, a system message goes in front of the first question.
MIXTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = "
    "messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for message in "
    "loop_messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('After the "
    "optional system message, conversation roles must alternate user/assistant/...') }}{%- endif %}{%- if "
    "message['role'] == 'user' %}{{- ' [INST] ' + (system ~ '\\n\\n' if loop.first and system is defined else '') + "
    "message['content'] + ' [/INST]' }}{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
TOOLS = (
    "{%- set ns = namespace(n=0) %}{% macro call(c) %}<call>{{ c.function | tojson }}</call>{% endmacro %}"
    "{%- for m in messages %}{%- set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.role }}:"
    "{% if m.content is string %}{{ m.content }}"
    "{% elif m.content %}{% for part in m.content %}{{ part.text if part.type == 'text' else '[img]' }}{% endfor %}"
    "{% endif %}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ call(c) }}{% endfor %}{% endif %}"
    "{% generation %}{{ m.reasoning_content or '' }}{% endgeneration %}{% if m.role == 'stop' %}{% break %}{% endif %}"
    "{% endfor %}{{ dict(a=1) | tojson(indent=1) }}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None, "c": "é<&>"}}}
CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    [{"role": "system", "content": "be  brief\n"}, {"role": "user", "content": "日本語 🙂 {{ 7 * 7 }} <|im_end|>"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "look"}]}],
    [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "hm"}],
    [{"role": "user", "content": "a"}, {"role": "stop", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
)


def _byte_level(folder: Path, template: Any = None, **config: Any) -> PreTrainedTokenizerFast:
    """Save a tokenizer of bytes with <s> in front of texts, and return it as transformers loads it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**given, **({"chat_template": template} if template else {})})
    )
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("template", [CHATML, MIXTRAL, TOOLS], ids=["chatml", "mixtral", "tools"])
def test_a_chat_is_what_transformers_makes_of_it(template: str, tmp_path: Path) -> None:
    stock = _byte_level(tmp_path, template)
    rendered = 0
    with ChatTemplate(tmp_path) as render:
        for each in CHATS:
            (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": each}) + "\n")
            spec = TraceSpec(domain="d", location=str(tmp_path / "chat.jsonl"))
            try:
                expected = stock.apply_chat_template(each, tokenize=False)
            except Exception:  # noqa: BLE001 - whatever a template raises
                with pytest.raises(TraceError, match=r"chat\.jsonl, line 1: the checkpoint's chat template refuses"):
                    list(read_documents(spec, "all", render))
                continue
            (document,) = read_documents(spec, "all", render)
            assert document.text == expected and document.is_rendered
            ids = stock.apply_chat_template(each)["input_ids"]
            (tokens,) = load_tokenizer(tmp_path)([document.text], special=False)
            assert tokens == ids
            rendered += 1
    assert rendered >= 3


def test_special_tokens_are_those_of_the_template(tmp_path: Path) -> None:
    _byte_level(tmp_path, MIXTRAL)
    rows = [{"messages": CHATS[0]}, {"messages": "a plain text in the same column"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatTemplate(tmp_path) as template:
        corpus = load_corpus(
            parse_traces([str(tmp_path / "a.jsonl")]), load_tokenizer(tmp_path), splits=["all"], length=64,
            max_tokens=None, render=template.render,
        )  # fmt: skip
        assert template.sha256 is not None
    assert [int(window.tokens[0]) for window in corpus.windows] == [256, 256]
    assert [window.tokens.tolist().count(256) for window in corpus.windows] == [1, 1]


def test_without_a_template_chats_are_lines_and_nothing_is_started(tmp_path: Path) -> None:
    _byte_level(tmp_path)
    with ChatTemplate(tmp_path) as template:
        assert template.render is None and template.sha256 is None
        assert _texts(tmp_path, CHATS[0], template) == ["user: hi\nassistant: yo"]
        with pytest.raises(TraceError, match=r"line 1: .*tool calls.*no chat template: leave out"):
            _texts(tmp_path, CHATS[3], template)


def _texts(folder: Path, messages: Any, template: ChatTemplate) -> list[str]:
    (folder / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    spec = TraceSpec(domain="d", location=str(folder / "chat.jsonl"))
    return [document.text for document in read_documents(spec, "all", template.render)]


@pytest.mark.parametrize("given", ["config", "list", "file", "file over config", "more"])
def test_the_template_is_the_one_that_transformers_chooses(given: str, tmp_path: Path) -> None:
    other = "other{{ messages[0].content }}"
    config: Any = {"config": CHATML, "file over config": other}.get(given)
    if given == "list":
        config = [{"name": "tool_use", "template": other}, {"name": "default", "template": CHATML}]
    _byte_level(tmp_path, config)
    if given in ("file", "file over config", "more"):
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    if given == "more":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(other)
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with ChatTemplate(tmp_path) as template:
        assert _texts(tmp_path, CHATS[0], template) == [stock.apply_chat_template(CHATS[0], tokenize=False)]


def test_special_tokens_are_found_in_either_form_and_file(tmp_path: Path) -> None:
    _byte_level(tmp_path, MIXTRAL, eos_token={"__type": "AddedToken", "content": "</s>"}, bos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    with ChatTemplate(tmp_path) as template:
        assert template._tokens == {"eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json: damaged"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "default"}]}'}, r"damaged \(chat_template\)"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "x"}]}'}, "no chat template is the"),
        ({"chat_template.jinja": b"\xff"}, "chat template cannot be read"),
        ({"additional_chat_templates/rag.jinja": "x"}, r"default one of rag: save one as chat_template\.jinja"),
    ],
)
def test_a_damaged_template_is_an_error_of_one_line(files: dict[str, Any], says: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=says) as caught:
        ChatTemplate(tmp_path)
    assert "\n" not in str(caught.value)


FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (FOREVER, "takes longer than"),
        ("{{ 'a' * 10**10 }}", "more than 2 GiB"),
        ("{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}", "more than 2 GiB"),
        ("{{ raise_exception('no\nsystem role') }}", r"refuses this chat \(no system role\)"),
        ("{% if %}", "refuses this chat"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this chat"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "refuses this chat"),
        ("{% include '/etc/passwd' %}", "refuses this chat"),
    ],
)
def test_a_hostile_template_ends_in_a_line(
    template: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if template == FOREVER:  # a second instead of ten
        hurried = Path(chat_worker.__file__).read_text().replace("_SECONDS = 10.0", "_SECONDS = 1.0")
        (tmp_path / "worker.py").write_text(hurried)
        monkeypatch.setattr(chat, "_WORKER", tmp_path / "worker.py")
    _byte_level(tmp_path, template)
    with ChatTemplate(tmp_path) as render:
        with pytest.raises(
            TraceError, match=rf"chat\.jsonl, line 1: the checkpoint's chat template .*{says}"
        ) as caught:
            _texts(tmp_path, CHATS[0], render)
        assert "\n" not in str(caught.value) and "leave it out" in str(caught.value)


def test_the_next_chat_is_rendered_after_one_that_was_refused(tmp_path: Path) -> None:
    _byte_level(tmp_path, MIXTRAL)
    with ChatTemplate(tmp_path) as render:
        with pytest.raises(ValueError, match="must alternate"):
            render([{"role": "user", "content": "a"}] * 2)
        assert render([{"role": "user", "content": "a"}]) == "<s> [INST] a [/INST]"
        worker = render._worker
        assert worker is not None
        worker.kill()
        worker.wait()
        with pytest.raises(ValueError, match="ended its process"):
            render([{"role": "user", "content": "a"}])
        assert render([{"role": "user", "content": "b"}]) == "<s> [INST] b [/INST]"
        worker = render._worker
    assert worker is not None and worker.poll() is not None


def test_the_same_chat_gives_the_same_tokens_on_another_day(tmp_path: Path) -> None:
    _byte_level(tmp_path, "{{ strftime_now('%d %b %Y') }}")
    with ChatTemplate(tmp_path) as render:
        assert render([{"role": "user", "content": "a"}]) == "01 Jan 2025"


def test_the_split_of_a_chat_does_not_depend_on_the_template(tmp_path: Path) -> None:
    _byte_level(tmp_path, CHATML)
    pq.write_table(
        pa.table({"messages": [CHATS[0], [*CHATS[0], {"role": "user", "content": "x"}]]}), tmp_path / "c.parquet"
    )

    def keys(render: Any) -> list[str]:
        spec = TraceSpec(domain="d", location=str(tmp_path / "c.parquet"))
        return [document.key for document in read_documents(spec, "all", render)]

    with ChatTemplate(tmp_path) as template:
        assert keys(template.render) == keys(None) == keys(lambda messages: "another")


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    yield


@pytest.mark.usefixtures("no_process")
def test_texts_start_no_process(tmp_path: Path) -> None:
    _byte_level(tmp_path, CHATML)
    with ChatTemplate(tmp_path) as template:
        assert _texts(tmp_path, "plain", template) == ["plain"]
        assert _texts(tmp_path, [], template) == []
        assert template.sha256 is None


def test_a_list_that_is_no_chat_names_the_column(tmp_path: Path) -> None:
    _byte_level(tmp_path, CHATML)
    with ChatTemplate(tmp_path) as template, pytest.raises(TraceError, match=re.escape("name a column of text")):
        _texts(tmp_path, [1, 2], template)


def test_a_document_is_a_text_unless_it_says_otherwise() -> None:
    assert not Document("a", "b").is_rendered
