import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from moesurgeon.errors import CheckpointError
from moesurgeon.traces.tokenizer import load_tokenizer

TEXTS = ["def f(x):\n    return x", "naïve 日本語 🙂", "", "x" * 5000]


def _byte_level() -> Any:
    """Return a tokenizer with one token per byte, and <s> with the number 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def test_a_text_is_neither_cut_nor_padded_whatever_the_file_says(tmp_path: Path) -> None:
    tokenizer = _byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer(tmp_path)(TEXTS)
    assert [len(row) for row in ids] == [len(text.encode()) for text in TEXTS]
    assert [_byte_level().decode(row) for row in ids] == TEXTS


@pytest.mark.parametrize("bos", ["<s>", {"__type": "AddedToken", "content": "<s>"}])
@pytest.mark.parametrize("said_by", ["nobody", "processor", "config", "both"])
def test_special_tokens_come_once_if_the_checkpoint_wants_them(said_by: str, bos: Any, tmp_path: Path) -> None:
    tokenizer = _byte_level()
    if said_by in ("processor", "both"):
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": bos, "add_bos_token": said_by in ("config", "both")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for row, text in zip(load_tokenizer(tmp_path)(TEXTS), TEXTS, strict=True):
        assert row.count(256) == (said_by != "nobody")
        assert len(row) == len(text.encode()) + (said_by != "nobody")
        assert 256 not in row[1:]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no tokenizer: copy tokenizer.json"),
        ({"config.json": "{}"}, "no tokenizer: copy tokenizer.json"),
        ({"tokenizer.json": "{not json"}, r"tokenizer\.json: damaged"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json: damaged"),
        ({"tokenizer.model": "not sentencepiece", "config.json": "{}"}, "transformers cannot load"),
    ],
)
def test_no_usable_tokenizer_is_an_error_of_one_line(files: dict[str, str], says: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration_is_an_error_of_one_line(tmp_path: Path) -> None:
    _byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: damaged"):
        load_tokenizer(tmp_path)


def test_older_layouts_go_through_transformers(tmp_path: Path) -> None:
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "router", "expert"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert load_tokenizer(tmp_path)(["router expert", "expert"]) == [[1, 5, 6, 2], [1, 6, 2]]


def test_text_is_read_and_tokenised_without_torch(tmp_path: Path) -> None:
    _byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a text of more than eight tokens")
    code = f"""
import sys
from pathlib import Path
from moesurgeon.traces.spec import parse_traces
from moesurgeon.traces.tokenizer import load_tokenizer
from moesurgeon.traces.windows import load_corpus
folder = Path({str(tmp_path)!r})
corpus = load_corpus(parse_traces([str(folder / "a.txt")]), load_tokenizer(folder),
                     splits=["all"], length=16, max_tokens=None)
assert corpus.tokens == {{"a": 32}}, corpus.tokens
loaded = {{"torch", "transformers", "datasets", "pyarrow"}} & sys.modules.keys()
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
