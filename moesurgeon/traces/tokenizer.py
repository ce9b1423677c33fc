"""The tokenizer of a checkpoint, as functions from texts to token numbers and back.

``tokenizer.json`` is read by the tokenizers library itself: importing transformers takes seconds and
brings torch along. Only older layouts (a sentencepiece model alone) go through transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesurgeon.errors import CheckpointError
from moesurgeon.traces.windows import Tokenize

Detokenize = Callable[[list[list[int]]], list[str]]

JSON_NAME = "tokenizer.json"
_OLDER_LAYOUTS = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(folder: Path) -> Tokenize:
    """Return the tokenizer in the checkpoint ``folder``; texts get the model's special tokens.

    A text is never cut or padded, whatever the files say. Raises CheckpointError if there is no
    tokenizer or if it is damaged.
    """
    if (folder / JSON_NAME).is_file():
        return _from_json(folder)
    if has_tokenizer(folder):
        return _from_transformers(folder)
    raise CheckpointError(f"{folder}: no tokenizer: copy tokenizer.json from the original checkpoint")


def has_tokenizer(folder: Path) -> bool:
    """Tell whether the checkpoint ``folder`` has a tokenizer in any layout that is read."""
    return any((folder / name).is_file() for name in (JSON_NAME, *_OLDER_LAYOUTS))


def load_detokenizer(folder: Path) -> Detokenize:
    """Return what turns token numbers into texts, special tokens left out; raises as :func:`load_tokenizer` does."""
    if (folder / JSON_NAME).is_file():
        tokenizer = read_tokenizer_json(folder / JSON_NAME)
        return lambda rows: tokenizer.decode_batch(rows, skip_special_tokens=True)
    older = read_older(folder)
    return lambda rows: older.batch_decode(rows, skip_special_tokens=True)


def read_tokenizer_json(path: Path) -> Any:
    """Return the tokenizer in a ``tokenizer.json``; CheckpointError for one that is damaged."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: damaged ({reason}): copy it from the original checkpoint, or update tokenizers"
        ) from error


def _from_json(folder: Path) -> Tokenize:
    tokenizer = read_tokenizer_json(folder / JSON_NAME)
    # Some files still say how their training data was cut and padded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos = _asked_bos(folder)
    bos_id = None if bos is None else tokenizer.token_to_id(bos)
    added = tokenizer.encode("a").ids[:1] == [bos_id]
    prefix = [] if bos_id is None or added else [bos_id]

    def tokenize(texts: list[str], /, *, special: bool = True) -> list[list[int]]:
        before = prefix if special else []
        return [before + encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

    return tokenize


def _asked_bos(folder: Path) -> str | None:
    """Return the token that ``tokenizer_config.json`` wants in front of a text, if it says so.

    DeepSeek-MoE says it there only: its tokenizer.json has no post-processor that would add it, and
    a model that never saw a text without it routes such texts differently.
    """
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        bos = config.get("bos_token") if config.get("add_bos_token") else None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: copy it from the original checkpoint") from error
    return bos.get("content") if isinstance(bos, dict) else bos


def read_older(folder: Path) -> Any:
    """Return the tokenizer of an older layout as transformers has it; CheckpointError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # OSError, ValueError, ImportError, KeyError: it depends on the class
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: transformers cannot load its tokenizer ({reason}): add a tokenizer.json"
        ) from error


def _from_transformers(folder: Path) -> Tokenize:
    tokenizer = read_older(folder)

    def tokenize(texts: list[str], /, *, special: bool = True) -> list[list[int]]:
        given = tokenizer(texts, add_special_tokens=special, truncation=False, padding=False, verbose=False)
        ids: list[list[int]] = given["input_ids"]
        return ids

    return tokenize
