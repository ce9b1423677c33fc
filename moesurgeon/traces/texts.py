"""From the value of a column to a document: a text as it is, a chat as its template or as lines of its turns.

The split of a document must not depend on the checkpoint that it is read for, so its key is a hash of the plain
form, whatever the template makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from moesurgeon.traces.documents import Document, digest_of_pieces, text_digest

Chat = list[dict[str, Any]]
Render = Callable[[Chat], str]

_COLUMN = "name a column of text, as in PATH:COLUMN"


def document_of(value: Any, render: Render | None = None) -> Document | None:
    """Return the document that ``value`` holds, None if it holds no text; ``render`` makes text of chats.

    Without ``render`` a chat becomes lines of ``role: content``. Raises ValueError, in one line, for what is neither
    text nor chat, and for a chat that cannot be rendered.

    >>> document_of([{"role": "user", "content": "hi"}]).text
    'user: hi'
    >>> document_of([{"role": "user", "content": "hi"}], lambda chat: f"<{chat[0]['content']}>").text
    '<hi>'
    """
    if render is None or not isinstance(value, list):
        text = text_of(value)
        return Document(key_of(text), text) if text.strip() else None
    if not value:
        return None
    if not all(isinstance(message, dict) and "role" in message for message in value):
        raise ValueError(f"a list whose items are not messages with 'role': {_COLUMN}")
    # As apply_chat_template: templates write out the "None" of a field that other rows of a parquet file have.
    chat: Chat = [{key: item for key, item in message.items() if item is not None} for message in value]
    try:
        plain = text_of(chat)
    except ValueError:  # tool calls and the like, which only the template knows how to write
        plain = json.dumps(chat, sort_keys=True, default=str)
    text = text_of(render(chat))
    return Document(key_of(plain), text, is_rendered=True) if text.strip() else None


def key_of(text: str) -> str:
    """Return the name of a text for good: a hash of its words."""
    return f"text:{text_digest(text).hex()}"


def key_of_pieces(pieces: Iterable[str]) -> str:
    """Return the name of the text that ``pieces`` make; one piece at a time.

    >>> key_of_pieces(["\\n", "one\\n\\n", "tw", "o", "\\n"]) == key_of("one two")
    True
    """
    return f"text:{digest_of_pieces(pieces).hex()}"


def text_of(value: Any) -> str:
    """Return the text of a column's value: a string, or a chat as lines of ``role: content``.

    None is the empty text. Raises ValueError for anything else.

    >>> text_of([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}])
    'user: hi\\nassistant: hello'
    """
    if value is None:
        return ""
    if isinstance(value, str):
        if value.isascii():  # cheap to tell, and true of most
            return value
        # JSON can spell half a surrogate pair, which no tokenizer takes: U+FFFD, as decoders do.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return "\n".join(map(_line, value))
    raise ValueError(f"{type(value).__name__} where a text or a list of messages should be: {_COLUMN}")


def _line(message: Any) -> str:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"a list whose items are not messages with 'role' and 'content': {_COLUMN}")
    if message.get("tool_calls"):
        raise ValueError(
            "a message with tool calls, for which the checkpoint has no chat template: leave out the row, "
            "or add the template's file to the checkpoint"
        )
    content = message["content"]
    if isinstance(content, list):  # of parts; images and the like have no text
        texts = [part["text"] for part in content if isinstance(part, dict) and part.get("text") is not None]
        content = "\n".join(map(text_of, texts))
    return f"{text_of(message['role'])}: {text_of(content)}"
