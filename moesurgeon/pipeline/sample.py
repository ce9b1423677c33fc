"""``sample``: write text that a checkpoint draws from itself, to heal and to profile on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from moesurgeon.checkpoint.places import refuse_within
from moesurgeon.checkpoint.whole_file import refuse_file, whole_file
from moesurgeon.engine.budget import Demand, share_out
from moesurgeon.engine.device import Placement, place
from moesurgeon.engine.model import context_length
from moesurgeon.engine.streams import Source
from moesurgeon.errors import CheckpointError, NothingToDo, UsageError
from moesurgeon.evaluation.sampled import sampled
from moesurgeon.families.keys import count_of
from moesurgeon.pipeline.decoding import decoding_bytes, ends_of, refuse_spread, whole
from moesurgeon.pipeline.options import Running, SampleSpec
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.tokenizer import load_detokenizer, load_tokenizer

_EMPTY = 20
"""Batches without a single token after which a model is taken to say nothing."""


def sample(
    source: str,
    output: Path,
    spec: SampleSpec,
    running: Running,
    progress: Progress = SILENT,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write texts that ``source`` draws from itself to ``output``, one {"text": ...} a line; return what they are.

    Raises UsageError if the output exists or the checkpoint does not fit into memory, NothingToDo for a model that
    ends every text before it begins.
    """
    _refuse_output(output, overwrite=overwrite)
    subject = open_subject(source)
    refuse_within(output, "--output", subject.root)
    decode = load_detokenizer(subject.root)
    placement = None if spec.uniform else place(running.device, running.dtype, subject.stored_dtype)
    texts: list[str] = []
    tokens = whole_texts = 0
    started = time.monotonic()
    with ExitStack() as stack:
        part = stack.enter_context(whole_file(output, overwrite=overwrite, makes_folders=True))
        drawn = (
            uniform(count_of(subject.checkpoint.config, "vocab_size", 0), spec)
            if placement is None
            else _own(subject, spec, placement, running.max_memory, stack)
        )
        advance = stack.enter_context(progress.task("sampling", spec.tokens, "tokens"))
        empty = 0
        for rows in drawn:
            before = tokens
            for row in rows:
                mine = row[: spec.tokens - tokens]
                if mine and (text := decode([mine])[0]).strip():
                    texts.append(text)
                    tokens += len(mine)
                    whole_texts += len(row) < spec.length
            advance(tokens - before)
            empty = 0 if tokens > before else empty + 1
            if tokens >= spec.tokens or empty == _EMPTY:
                break
        if not texts:
            raise NothingToDo(f"{source} ends every text where it begins; nothing was written: sample a base model")
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        part.write_text("".join(lines), encoding="utf-8")
    return {
        "checkpoint": source,
        "path": str(output),
        "texts": len(texts),
        "tokens": tokens,
        "whole_texts": whole_texts,
        "distinct": len(set(texts)),
        "uniform": spec.uniform,
        "temperature": None if spec.uniform else spec.temperature,
        "seed": spec.seed,
        "placement": None if placement is None else str(placement),
        "tokens_per_second": tokens / (time.monotonic() - started),
    }


def refuse_unsampled(subject: Subject, spec: SampleSpec, running: Running) -> None:
    """Raise what :func:`sample` would raise before it draws anything."""
    load_detokenizer(subject.root)
    if not spec.uniform:
        with ExitStack() as stack:
            placement = place(running.device, running.dtype, subject.stored_dtype)
            _opened(subject, spec, placement, running.max_memory, stack)


def _own(
    subject: Subject, spec: SampleSpec, placement: Placement, max_memory: int | None, stack: ExitStack
) -> Iterator[list[list[int]]]:
    """Return what the model of ``subject`` draws; it is in memory until ``stack`` is closed."""
    source, beginning, ends = _opened(subject, spec, placement, max_memory, stack)
    return sampled(
        stack.enter_context(whole(source)),
        beginning,
        spec.length,
        ends,
        rows=spec.rows,
        temperature=spec.temperature,
        seed=spec.seed,
    )


def _opened(
    subject: Subject, spec: SampleSpec, placement: Placement, max_memory: int | None, stack: ExitStack
) -> tuple[Source, list[int], list[int]]:
    """Return the source of ``subject``, of which nothing is read yet, how a text begins and what ends it."""
    ends = ends_of(subject)
    beginning = beginning_of(subject, ends)
    most = context_length(subject.anatomy) - len(beginning)
    if spec.length > most:
        raise UsageError(f"--length {spec.length} does not fit into the context of {subject.name}; give at most {most}")
    source = stack.enter_context(Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement))
    refuse_spread(placement, "sample without --uniform")
    # Fewer rows at once would be other texts.
    work = decoding_bytes(subject.anatomy, placement, rows=spec.rows, positions=len(beginning) + spec.length)
    share_out(max_memory, [source], lambda _tokens: Demand(batches=[], work=work), whole="sample without --uniform")
    return source, beginning, ends


def uniform(vocabulary: int, spec: SampleSpec) -> Iterator[list[list[int]]]:
    """Yield, without end, texts of tokens of which each is as likely as any other."""
    rng = np.random.default_rng(spec.seed)
    while True:
        yield rng.integers(0, vocabulary, (spec.rows, spec.length)).tolist()


def beginning_of(subject: Subject, ends: list[int]) -> list[int]:
    """Return what stands in front of every text: what the tokenizer puts there, or else what ends the one before."""
    tokenize = load_tokenizer(subject.root)
    (plain,), (special,) = tokenize(["a"], special=False), tokenize(["a"])
    before = special[: len(special) - len(plain)] if special[len(special) - len(plain) :] == plain else []
    found = before or ends[:1]
    if not found:
        raise CheckpointError(
            f"{subject.root}: neither its tokenizer nor its eos_token_id says how a text begins; restore "
            "tokenizer_config.json or generation_config.json"
        )
    return found


def _refuse_output(output: Path, *, overwrite: bool) -> None:
    refuse_file(output, "--output", overwrite=overwrite, makes_folders=True)
    if output.suffix != ".jsonl":
        raise UsageError(f"{output.name} is to be read as text again; name it something.jsonl")
