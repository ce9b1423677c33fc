"""What a teacher said of a text, on the disk: a file of rows, one for each token, for every figure.

cache.json            the digest of all that it depends on, the shapes; written last
indices.npy ...       [N, ..] of all tokens, window after window
heldout.npy           the teacher's loss on each window of the text that judges
counts.npy            and whom its routers chose there (``recovery.monitor``)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moesurgeon.checkpoint.install import sync
from moesurgeon.engine.batches import Batch, rows_for, to_batch
from moesurgeon.errors import InputError, OutputError
from moesurgeon.progress import Progress
from moesurgeon.recovery.estimator import Learning, learning_routers
from moesurgeon.recovery.judge import Judge
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.teacher import Likeliest, Said, heard
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.traces.windows import Corpus, Window

_FACTS, _HELDOUT, _COUNTS = "cache.json", "heldout.npy", "counts.npy"
Array = NDArray[Any]


class Cached:
    """A finished cache of ``corpus``; ``experts``: by layer which of the teacher's experts the student has."""

    def __init__(self, folder: Path, corpus: Corpus, experts: Mapping[int, Sequence[int]] | None) -> None:
        names = json.loads((folder / _FACTS).read_text(encoding="utf-8"))["arrays"]
        try:
            self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
            self.heldout: Array = np.load(folder / _HELDOUT)
            self.counts: Array = np.load(folder / _COUNTS)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} is damaged ({error}); remove it and begin anew") from error
        self._rows = _rows(corpus.windows)
        self._experts = experts
        self._layers = sorted(int(name.partition(".")[2]) for name in names if name.startswith("router."))
        self._hidden = sorted(int(name.partition(".")[2]) for name in names if name.startswith("hidden."))

    def says(self, batch: Batch) -> Said:
        device = batch.tokens.device
        ranges = [self._rows[id(window)] for window in batch.windows]

        def rows(name: str) -> torch.Tensor:
            array = self._arrays[name]
            found = np.concatenate([array[start:stop] for start, stop in ranges])
            return torch.from_numpy(found).to(device)

        likeliest = None
        if "indices" in self._arrays:
            likeliest = Likeliest(rows("indices").long(), rows("logq"), rows("logq_rest"))
        routers = [rows(f"router.{layer}") for layer in self._layers]
        if self._experts is not None:
            routers = [each[:, list(self._experts[layer])] for layer, each in zip(self._layers, routers, strict=True)]
        return Said(likeliest=likeliest, routers=routers, hidden=[rows(f"hidden.{layer}") for layer in self._hidden])


def is_cached(folder: Path, digest: str) -> bool:
    """Whether ``folder`` holds the whole cache ``digest``."""
    try:
        known = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return bool(known["digest"] == digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fill_cache(
    folder: Path,
    digest: str,
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    *,
    corpus: Corpus,
    heldout: Corpus,
    losses: Losses,
    length: int,
    progress: Progress,
) -> None:
    """Let ``teacher`` say of ``corpus`` what ``losses`` ask for, and judge it on ``heldout``.

    The folder is there whole or not at all.

    Raises OutputError for a disk that refuses.
    """
    part = folder.with_name(f"{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with learning_routers(teacher, anatomy, candidates=anatomy.top_k) as learning:
            judged = Judge(teacher, anatomy, learning, heldout, length).judged(progress)
            arrays = _filled(
                part,
                teacher,
                anatomy,
                learning,
                windows=corpus.windows,
                losses=losses,
                length=length,
                progress=progress,
            )
        np.save(part / _HELDOUT, judged.sums)
        np.save(part / _COUNTS, judged.counts)
        (part / _FACTS).write_text(json.dumps({"digest": digest, "arrays": sorted(arrays)}) + "\n", encoding="utf-8")
        for path in part.iterdir():
            sync(path)
        sync(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise OutputError(
            f"what the teacher says cannot be kept in {folder} ({os.strerror(error.errno or 0)}); free space, or name "
            "another place with --cache"
        ) from error
    finally:
        if part.exists():
            shutil.rmtree(part, ignore_errors=True)
            with suppress(OSError):  # it holds something else
                folder.parent.rmdir()


def _filled(
    part: Path,
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    learning: Learning,
    *,
    windows: Sequence[Window],
    losses: Losses,
    length: int,
    progress: Progress,
) -> dict[str, Array]:
    """Write the rows of every window, in files that are mapped: what is written need not fit into memory."""
    total = sum(len(window.tokens) for window in windows)
    arrays: dict[str, Array] = {}
    if not losses.from_teacher:
        return arrays
    step, position = rows_for(length), 0
    with progress.task("asking the teacher", total, "tokens") as advance:
        for start in range(0, len(windows), step):
            batch = to_batch(windows[start : start + step], teacher.device)
            with learning.recording() as routed:
                said = heard(teacher, anatomy, batch, losses, routed)
            for name, rows in _figures(said, batch, anatomy, losses).items():
                if name not in arrays:
                    shape = (total, *rows.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(part / f"{name}.npy", "w+", rows.dtype, shape)
                arrays[name][position : position + len(rows)] = rows
            position += batch.text_tokens
            advance(batch.text_tokens)
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    return arrays


def _figures(said: Said, batch: Batch, anatomy: Anatomy, losses: Losses) -> dict[str, Array]:
    """Return what is kept of ``said``, a row for each token."""
    found: dict[str, torch.Tensor] = {}
    if said.logits is not None:
        likeliest = Likeliest.of(said.logits[batch.is_text], losses.temperature)
        found = {
            "indices": likeliest.indices.int(),
            "logq": likeliest.logq,
            "logq_rest": likeliest.logq_rest,
        }
    for layer, logits in zip(anatomy.moe_layers, said.routers, strict=bool(said.routers)):
        found[f"router.{layer}"] = logits.float()
    for layer, states in enumerate(said.hidden):
        # numpy knows no bfloat16; float16 would overflow on the outliers of large models.
        found[f"hidden.{layer}"] = states.float()
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}


def _rows(windows: Sequence[Window]) -> dict[int, tuple[int, int]]:
    """Return by window, known by identity, where its rows begin and end."""
    found, start = {}, 0
    for window in windows:
        found[id(window)] = (start, start + len(window.tokens))
        start += len(window.tokens)
    return found
