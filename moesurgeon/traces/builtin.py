"""The traces that come with moesurgeon, by name: ``builtin:python``, ``builtin:prose`` and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moesurgeon.traces import generated, stdlib_text
from moesurgeon.traces.documents import Document, Split

BUILTIN_TRACES: dict[str, Callable[[Split], Iterator[Document]]] = {
    "python": stdlib_text.python_documents,
    "prose": stdlib_text.prose_documents,
    "arithmetic": generated.arithmetic_documents,
    "json": generated.json_documents,
    "logs": generated.log_documents,
    "unicode": stdlib_text.unicode_documents,
}
