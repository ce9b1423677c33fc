"""Rows out of files: one reader per kind of file, each of them a stream of (where it is, value).

A reader takes (path, column) and yields rows; ``column`` None means the first of COLUMNS that is there.
What cannot be read is a TraceError that names the file and the line or row.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moesurgeon.errors import TraceError

COLUMNS = ("text", "content", "messages", "prompt")
_LONGEST_LINE = 64 << 20  # bytes; a longer one is a JSON document rather than JSON lines
_PARAGRAPHS = 4000  # characters of plain text after which the next blank line ends the document
_NO_PARAGRAPHS = 16_000  # the same where no blank line comes; a line longer than this is cut
_ROWS = 64  # per parquet or arrow batch: a row can be a whole book
_BUFFER = 1 << 20  # bytes; without it, or with pre_buffer, pyarrow holds the column of a whole row group
_ONE_PER_LINE = "write one object per line (an array: jq -c '.[]' in.json > out.jsonl)"

Row = tuple[str, Any]  # ("chat.jsonl, line 7", the value of the column there)
Reader = Callable[[Path, str | None], Iterator[Row]]


def reader_of(path: Path) -> Reader | None:
    """Return the reader for ``path`` by its name, or for a folder by what is in it; None: there is none."""
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return saved_dataset if saved else None
    return next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)


def json_lines(path: Path, column: str | None) -> Iterator[Row]:
    """Yield one row per line that is not blank."""
    for number, line in enumerate(_chunks(path, _LONGEST_LINE + 1), start=1):
        where = f"{path}, line {number}"
        if len(line) > _LONGEST_LINE:
            raise TraceError(f"{where}: longer than 64 MiB: {_ONE_PER_LINE}")
        if not line.strip():
            continue
        try:
            # utf-8-sig: some editors put a byte order mark in front of the first line.
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise _not_utf8(where) from error
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(": line")[0]
            raise TraceError(f"{where}: not JSON ({reason}): {_ONE_PER_LINE}") from error
        if not isinstance(record, dict):
            raise TraceError(f"{where}: {type(record).__name__} where an object should be: {_ONE_PER_LINE}")
        # The first row decides, so that a file is never read from two columns in turn.
        column = _checked(where, column, list(record))
        yield where, record[column]


def plain_text(path: Path, column: str | None) -> Iterator[Row]:
    """Yield passages: groups of paragraphs of about 4000 characters."""
    if column is not None:
        raise TraceError(f"{path}: plain text has no column {column!r}: leave out :{column}")
    piece: list[str] = []
    size, first = 0, 1
    for number, line in _lines(path):
        piece.append(line)
        size += len(line)
        if size >= (_NO_PARAGRAPHS if line.strip() else _PARAGRAPHS):
            yield f"{path}, line {first}", "".join(piece).strip("\n")
            piece, size, first = [], 0, number
    yield f"{path}, line {first}", "".join(piece).strip("\n")


def is_plain_text(path: Path) -> bool:
    """Whether ``path`` is read in passages rather than by rows."""
    return reader_of(path) is plain_text


def text_pieces(path: Path) -> Iterator[str]:
    """Yield the whole text of a plain text file in pieces, with line ends of one kind."""
    for _number, line in _lines(path):
        yield line


def parquet(path: Path, column: str | None) -> Iterator[Row]:
    """Yield the rows of a parquet file, batch by batch."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            column = _checked(str(path), column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(f"{path}, after row {number}", "parquet", error) from error


def saved_dataset(path: Path, column: str | None) -> Iterator[Row]:
    """Yield the rows of a folder that ``datasets.save_to_disk`` wrote; it is mapped, not loaded."""
    import datasets
    import pyarrow

    try:
        dataset = datasets.load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(str(path), "as a saved dataset", error) from error
    if isinstance(dataset, datasets.DatasetDict):
        if len(dataset) != 1:
            names = ", ".join(dataset)
            raise TraceError(f"{path}: holds {len(dataset)} splits ({names}): choose one, as in {path}/NAME")
        (dataset,) = dataset.values()
    column = _checked(str(path), column, dataset.column_names)
    # with_format: a dataset that was saved with the torch format would import torch and give tensors.
    batches = dataset.select_columns([column]).with_format(None).iter(batch_size=_ROWS)
    number = 0
    try:
        for batch in batches:
            for value in batch[column]:
                number += 1
                yield f"{path}, row {number}", value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(f"{path}, after row {number}", "as a saved dataset", error) from error


def arrow(path: Path, column: str | None) -> Iterator[Row]:
    """Yield the rows of an arrow file, as ``datasets`` keeps them; it is mapped, not loaded."""
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                schema, batches = (stream := pyarrow.ipc.open_stream(file)).schema, iter(stream)
            except pyarrow.ArrowInvalid:  # the other of the two forms
                whole = pyarrow.ipc.open_file(file)
                schema, batches = whole.schema, map(whole.get_batch, range(whole.num_record_batches))
            column = _checked(str(path), column, schema.names)
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS):
                    for value in batch.column(column).slice(start, _ROWS).to_pylist():
                        number += 1
                        yield f"{path}, row {number}", value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(f"{path}, after row {number}", "as arrow", error) from error


READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".json": json_lines,  # what many hubs call JSON lines
    ".json.gz": json_lines,
    ".txt": plain_text,
    ".txt.gz": plain_text,
    ".md": plain_text,
    ".parquet": parquet,
    ".arrow": arrow,
}


def _chunks(path: Path, longest: int) -> Iterator[bytes]:
    """Yield the lines of a file, gzip or not, with their ends; longer ones in parts of ``longest`` bytes."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(longest):
                yield line
                number += line.endswith(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(f"{path}, after line {number}", "on", error) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, long ones in parts, each with the number of the line after it."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1
    for chunk in _chunks(path, _NO_PARAGRAPHS):
        try:
            line = decoder.decode(chunk).replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}, line {number}") from error
        number += chunk.endswith(b"\n")
        yield number, line
    if decoder.getstate()[0]:
        raise TraceError(f"{path}, line {number}: ends within a character: copy the file again")


def _checked(where: str, column: str | None, present: Sequence[str]) -> str:
    """Return the column to read: ``column`` if it is present, the first usual one if it is None."""
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in present:
            return name
    names = " ".join(", ".join(present).split())[:200] or "none"  # JSON allows line breaks in names
    raise TraceError(f"{where}: no column {' or '.join(wanted)}: name one of its columns ({names}) as PATH:COLUMN")


def _not_utf8(where: str) -> TraceError:
    return TraceError(f"{where}: not UTF-8: convert the file with iconv -f ENCODING -t UTF-8")


def _damaged(where: str, what: str, error: Exception) -> TraceError:
    if isinstance(error, PermissionError):
        return TraceError(f"{where}: permission denied: make the file readable, or give another")
    reason = " ".join(str(error).split())[:200]  # pyarrow's messages have several lines
    return TraceError(f"{where}: cannot be read {what} ({reason}): copy or write it again")
