"""What ``prune_quality.py`` measures on, and where it keeps what it measured."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_report import Row
from moesurgeon.engine.batches import batches_of, rows_for
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.evaluation.measure import LOSS, measure
from moesurgeon.pipeline.options import Text
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.text import read_text, window_length
from moesurgeon.traces.builtin import BUILTIN_TRACES
from moesurgeon.traces.windows import Corpus, Window

REPORT_TOKENS = 49152
FRESH_TOKENS = 180000
"""As many of the report split, of which what is seen is left out."""


class Rows:
    """What was measured, in memory and appended to ``path`` as it comes."""

    def __init__(self, path: Path | None, options: dict[str, Any]) -> None:
        self.path, self.all = path, list[Row]()
        if path is not None and path.exists():
            # A kill may have left the last line in part; it is measured again.
            lines = path.read_text(encoding="utf-8").split("\n")
            path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
            self.all = [json.loads(line) for line in lines[:-1]]
        if not self.all:
            self.add({"options": options})
        elif self.all[0]["options"] != options:
            raise SystemExit(f"{path} was measured with other options: {self.all[0]['options']}; name another file")

    def add(self, row: Row) -> None:
        self.all.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def know(self, name: str, subject: Subject, text: Row) -> None:
        """Take down on which ``text`` the checkpoint ``name`` is measured; exit if rows are of another one."""
        known = next((row for row in self.all if row.get("text") == name), None)
        if known is None:
            self.add({"text": name, "fingerprint": subject.fingerprint, **text})
        elif known["fingerprint"] != subject.fingerprint or any(known.get(name) != text[name] for name in text):
            raise SystemExit(f"{self.path} has rows of another {name} or of other text; name another file")

    def find(self, **of: Any) -> Row | None:
        """Return a row of a cut with these values."""
        fitting = (row for row in self.all if "losses" in row and all(row[name] == of[name] for name in of))
        return next(fitting, None)


@dataclass(frozen=True)
class Words:
    """What a checkpoint is calibrated and reported on; ``split`` None: that of builtin traces for each purpose.

    ``seen``: text of whose documents none is to be in the report, since something was chosen by looking at it.
    """

    traces: dict[str, str]
    split: str | None
    report: Text
    seen: Text | None = None

    def calibration(self, without: str | None) -> tuple[str, ...]:
        if without is not None and without not in self.traces:
            raise SystemExit(f"--without {without}: the domains are {', '.join(self.traces)}")
        return tuple(trace for domain, trace in self.traces.items() if domain != without)


def words_for(checkpoint: str, given: argparse.Namespace) -> Words:
    if given.corpora is None or checkpoint.startswith("builtin:"):
        traces = {name: f"builtin:{name}" for name in BUILTIN_TRACES}
        seen = Text(traces=tuple(traces.values()), split="report", max_tokens=REPORT_TOKENS)
        if given.fresh:
            return Words(traces, None, replace(seen, max_tokens=given.report_tokens or FRESH_TOKENS), seen)
        return Words(traces, None, replace(seen, max_tokens=given.report_tokens or REPORT_TOKENS))
    if given.fresh:
        raise SystemExit("--fresh is for builtin checkpoints: name other --corpora")
    folders = sorted(path.parent for path in Path(given.corpora).glob("*/train.jsonl.gz"))
    if not folders:
        raise SystemExit(f"{given.corpora} has no DOMAIN/train.jsonl.gz")
    traces = {folder.name: f"{folder.name}={folder / 'train.jsonl.gz'}" for folder in folders}
    valid = tuple(f"{folder.name}={folder / 'valid.jsonl.gz'}" for folder in folders)
    return Words(traces, "calibration", Text(traces=valid, split="all", max_tokens=given.report_tokens))


def report_of(subject: Subject, words: Words) -> Corpus:
    """Return the text to report on."""
    corpus = read_text(subject, words.report, builtin_split="report")
    if words.seen is None:
        return corpus
    seen = {_text(window) for window in read_text(subject, words.seen, builtin_split="report").windows}
    known = {(window.domain, window.document) for window in corpus.windows if _text(window) in seen}
    windows = [window for window in corpus.windows if (window.domain, window.document) not in known]
    tokens = {name: sum(len(each.tokens) for each in windows if each.domain == name) for name in corpus.domains}
    return replace(corpus, windows=windows, tokens=tokens)


def _text(window: Window) -> tuple[str, bytes]:
    return window.domain, window.tokens.tobytes()


class Judge:
    """A checkpoint opened once with the report text, of which each cut's losses are taken by document.

    Also with ``validation_tokens`` of validation text, if there are to be any.
    """

    def __init__(self, subject: Subject, words: Words, source: Source, validation_tokens: int = 0) -> None:
        self.source = source
        rows = rows_for(window_length(subject, words.report))
        self._report = Part(report_of(subject, words), source, rows)
        self.corpus, self.text = self._report.corpus, self._report.text
        self._validation: Part | None = None
        if validation_tokens:
            text = Text(traces=tuple(words.traces.values()), split="validation", max_tokens=validation_tokens)
            self._validation = Part(read_text(subject, text, builtin_split="validation"), source, rows)
            self.text = {**self.text, "validation": self._validation.text}

    def losses(self, stream: Stream) -> Row:
        """Return the sum of nats of each document: ``losses``, and ``validation`` where there is such text."""
        found = {"losses": self._report.losses(stream)}
        return found if self._validation is None else {**found, "validation": self._validation.losses(stream)}


class Part:
    """Text that cuts are measured on: ``text`` says what it is, and what it costs the uncut checkpoint."""

    def __init__(self, corpus: Corpus, source: Source, rows: int) -> None:
        self.corpus = corpus
        self._batches = list(batches_of(corpus, rows=rows, tokens=BATCH_TOKENS, device=source.placement.device))
        uncut = measure(Stream(source), corpus.domains, self._batches)
        keys = np.stack([uncut.domain, uncut.document], axis=1)
        documents, number = np.unique(keys, axis=0, return_inverse=True)
        self._number = number.reshape(-1)
        self.text = {
            "domains": list(corpus.domains),
            "domain": documents[:, 0].tolist(),
            "positions": np.bincount(self._number, uncut.positions).tolist(),
            "teacher": self._by_document(uncut.sums[:, LOSS]),
        }

    def losses(self, stream: Stream) -> list[float]:
        """Return the sum of nats of each document."""
        return self._by_document(measure(stream, self.corpus.domains, self._batches).sums[:, LOSS])

    def _by_document(self, losses: Any) -> list[float]:
        return [round(float(loss), 6) for loss in np.bincount(self._number, losses)]
