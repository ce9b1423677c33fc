"""Chats as the model would see them: rendered with the checkpoint's own template, where its tokenizer has one.

A template is a program that came with the weights, so it is run by a process of its own (``chat_worker``) inside
the sandbox of transformers, with bounds on its time, its memory and what it writes. No code of the checkpoint is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from moesurgeon.errors import CheckpointError
from moesurgeon.traces.texts import Chat, Render

_CONFIG, _FILE, _MORE, _TOKENS = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "special_tokens_map.json",
)
_REMEDY = "correct the row or leave it out"
_WORKER = Path(__file__).with_name("chat_worker.py")


class ChatTemplate:
    """The chat template of a checkpoint; renders a chat when called. To be closed, as a ``with`` statement does.

    ``source`` is None where the tokenizer has no template, and ``render`` as well.
    """

    def __init__(self, folder: Path) -> None:
        config = _json(folder / _CONFIG)
        self.source = _template(folder, config)
        self._tokens = _special_tokens(folder, config)
        self._worker: subprocess.Popen[bytes] | None = None
        self.was_used = False

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    @property
    def render(self) -> Render | None:
        """What makes text of a chat; None where the tokenizer has no template."""
        return None if self.source is None else self

    @property
    def sha256(self) -> str | None:
        """Hash of the template if chats were rendered with it."""
        used = self.source is not None and self.was_used
        return hashlib.sha256(str(self.source).encode()).hexdigest() if used else None

    def __call__(self, chat: Chat) -> str:
        """Return the text of ``chat``; ValueError in one line if the template refuses it or runs out of bounds."""
        self.was_used = True
        worker = self._worker or self._started()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(chat, default=str).encode() + b"\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self._worker = None
            raise ValueError(f"the checkpoint's chat template {_end_of(worker)}")
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            reason = " ".join(answer["error"].split())[:200]
            raise ValueError(f"the checkpoint's chat template refuses this chat ({reason}): {_REMEDY}")
        return answer["text"]

    def _started(self) -> subprocess.Popen[bytes]:
        # -P: this folder is not where the worker is to look for modules.
        command = [sys.executable, "-P", str(_WORKER)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # said when the first chat gets no answer
            worker.stdin.write(json.dumps({"template": self.source, "tokens": self._tokens}).encode() + b"\n")
        self._worker = worker
        return worker


def _end_of(worker: subprocess.Popen[bytes]) -> str:
    worker.communicate()
    if worker.returncode == -signal.SIGPROF:
        return f"takes longer than 10 s for this chat: {_REMEDY}"
    return f"ended its process (status {worker.returncode}), as too much memory does: {_REMEDY}"


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the template for plain chats, as transformers chooses it; None if the tokenizer has none at all."""
    found: dict[str, str] = {}
    try:
        if (folder / _FILE).is_file():
            found["default"] = (folder / _FILE).read_text(encoding="utf-8")
        for path in sorted((folder / _MORE).glob("*.jinja")):
            found[path.stem] = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: a chat template cannot be read: copy it from the original") from error
    given = config.get("chat_template")
    if not found and isinstance(given, str):
        return given
    if not found and isinstance(given, list):
        try:
            found = {str(each["name"]): str(each["template"]) for each in given}
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{folder / _CONFIG}: damaged (chat_template): copy it from the original") from error
    if found and "default" not in found:
        names = ", ".join(sorted(found))[:200]
        raise CheckpointError(f"{folder}: no chat template is the default one of {names}: save one as {_FILE}")
    return found.get("default")


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens by the names under which templates know them (``bos_token``, ...)."""
    given = {**_json(folder / _TOKENS), **config}
    tokens = {}
    for name, value in given.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: copy it from the original checkpoint") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: damaged: copy it from the original checkpoint")
    return loaded
