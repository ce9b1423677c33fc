"""Real text from the Python installation itself: source code, English prose, character tables.

Every machine that runs moesurgeon has it, so demonstrations and tests need no download. Keys are
module paths and topic names, so the splits agree between Python versions although the text differs
a little.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from moesurgeon.traces.documents import Document, Split, in_split, split_of

# Not written by people, not on every installation, or prose in disguise.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo",
     "lib2to3", "ensurepip", "__pycache__", "pydoc_data", "tkinter", "encodings"}
)  # fmt: skip
_CHUNK = 3000  # characters; about a thousand tokens of a small vocabulary


@lru_cache(maxsize=1)
def _modules() -> tuple[tuple[str, str], ...]:
    """Return (path relative to the standard library, source text) of its modules, in hash order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few modules are not UTF-8; no loss
        if len(source) > 400:
            found.append((relative.as_posix(), source))
    return tuple(sorted(found, key=lambda module: _shuffled(module[0])))


def python_documents(split: Split) -> Iterator[Document]:
    """Yield pieces of standard library source code, cut at line ends; key: the module's path."""
    yield from _in_turn({path: source for path, source in _modules() if in_split(path, split)})


def prose_documents(split: Split) -> Iterator[Document]:
    """Yield English: the language reference in ``pydoc_data``, docstrings and block comments.

    Docstrings and comments keep their module's key: its code and its prose are in the same split.
    """
    topics = _topics()
    # Some topics share a text ("if" and "else"); what another split has as well is left out.
    homes = {text: split_of(key) for key, text in topics.items()}
    texts = {key: text for key, text in topics.items() if in_split(key, split) and homes[text] == split_of(key)}
    for path, source in _modules():
        if in_split(path, split):
            texts[path] = "\n\n".join([*_docstrings(source), *_block_comments(source)])
    yield from _in_turn({key: texts[key] for key in sorted(texts, key=_shuffled)})


def unicode_documents(split: Split) -> Iterator[Document]:
    """Yield tables of characters with their names: a narrow, many-script niche. Key: the block."""
    blocks = []
    for start in range(0x20, 0x3000, 0x20):
        if not in_split(f"block:{start:04X}", split):
            continue
        rows = []
        for point in range(start, start + 0x20):
            name = unicodedata.name(chr(point), "")
            # Only what every supported Python knows: the tables of Unicode 3.2 are frozen.
            if name and unicodedata.ucd_3_2_0.name(chr(point), "") == name:
                rows.append(f"U+{point:04X} {unicodedata.category(chr(point))} {chr(point)} {name}")
        if len(rows) >= 8:
            blocks.append(Document(f"block:{start:04X}", "\n".join(rows) + "\n"))
    yield from sorted(blocks, key=lambda block: _shuffled(block.key))


def _topics() -> dict[str, str]:
    """Return the texts of the language reference by key; some distributions leave them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"topic:{name}": text for name, text in sorted(topics.items())}


def _in_turn(texts: dict[str, str]) -> Iterator[Document]:
    """Yield the first piece of every text, then the second of every one, and so on.

    A small budget of tokens then sees many subjects, and an interval over documents has many of them.
    """
    pieces = {key: list(_pieces(text)) for key, text in texts.items()}
    for number in range(max(map(len, pieces.values()), default=0)):
        for key, mine in pieces.items():
            if number < len(mine):
                yield Document(key, mine[number])


def _docstrings(source: str) -> Iterator[str]:
    """Yield the paragraphs of the docstrings that are prose rather than examples."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            text = "\n\n".join(part for part in paragraphs if ">>>" not in part)
            if text.count(" ") >= 12:
                yield text


def _block_comments(source: str) -> Iterator[str]:
    """Yield comments of at least three lines, without their number signs."""
    for match in re.finditer(r"(?:^[ ]*#[^\n]*\n){3,}", source, flags=re.MULTILINE):
        text = re.sub(r"^[ ]*#+ ?", "", match.group(), flags=re.MULTILINE).strip()
        if text.count(" ") >= 20 and sum(map(str.isalpha, text)) > 0.65 * len(text):
            yield text


def _pieces(text: str) -> Iterator[str]:
    """Cut ``text`` at line ends into pieces of about 3000 characters; leave out tiny remainders."""
    text = re.sub(r"[ \t]+\n", "\n", text)
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _CHUNK:
            yield "".join(piece)
            piece, size = [], 0
    if size > 200:
        yield "".join(piece)


def _shuffled(key: str) -> bytes:
    """Sort key that mixes subjects, so that a budget of tokens takes a bit of everything."""
    return hashlib.blake2b(b"order:" + key.encode(), digest_size=8).digest()
