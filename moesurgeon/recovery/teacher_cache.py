"""What a teacher said of a text, on the disk: a file of rows, one for each token, for every figure.

cache.json            the digest of all that it depends on, the windows by name, the shapes; written last
indices.npy ...       [N, ..] of all tokens, window after window
heldout.npy           the teacher's loss on each window of the text that judges
counts.npy            and whom its routers chose there (``recovery.monitor``)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesurgeon.checkpoint.install import sync
from moesurgeon.engine.batches import Batch
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import InputError, OutputError
from moesurgeon.progress import Progress
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.judge import Judge
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.said import Array, spoken_batches, write_said
from moesurgeon.recovery.schedule import window_name
from moesurgeon.recovery.teacher import Likeliest, Said
from moesurgeon.traces.windows import Corpus, Window

_FACTS, _HELDOUT, _COUNTS = "cache.json", "heldout.npy", "counts.npy"


class Cached:
    """A finished cache of ``corpus`` at least; ``experts``: by layer which of the teacher's experts the student has."""

    def __init__(self, folder: Path, corpus: Corpus, experts: Mapping[int, Sequence[int]] | None) -> None:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        names = facts["arrays"]
        try:
            self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
            self.heldout: Array = np.load(folder / _HELDOUT)
            self.counts: Array = np.load(folder / _COUNTS)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} is damaged ({error}); remove it and begin anew") from error
        self._rows = _rows(corpus.windows, facts["windows"])
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

        def router(layer: int) -> torch.Tensor:
            logits = rows(f"router.{layer}")
            return logits if self._experts is None else logits[:, list(self._experts[layer])]

        return Said(
            likeliest=likeliest,
            routers=_Lazy(router, self._layers),
            hidden=_Lazy(lambda layer: rows(f"hidden.{layer}"), self._hidden),
        )


class _Lazy(Sequence[torch.Tensor]):
    """What ``read`` makes of each of ``layers``, when it is asked for: all at once may not fit into memory."""

    def __init__(self, read: Callable[[int], torch.Tensor], layers: Sequence[int]) -> None:
        self._read, self._layers = read, layers

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        return self._read(self._layers[index])


def is_cached(folder: Path, digest: str, windows: Sequence[Window] = ()) -> bool:
    """Whether ``folder`` holds the whole cache ``digest``, with all of ``windows``."""
    try:
        known = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        held = {name for name, _ in known["windows"]}
        return bool(known["digest"] == digest) and all(window_name(window) in held for window in windows)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fill_cache(
    folder: Path,
    digest: str,
    teacher: Stream,
    *,
    corpus: Corpus,
    heldout: Corpus,
    losses: Losses,
    length: int,
    states: Path | None = None,
    progress: Progress,
) -> None:
    """Let ``teacher`` say of ``corpus`` what ``losses`` ask for, and judge it on ``heldout``.

    The folder is there whole or not at all. ``states``: where hidden states go if not into memory.

    Raises OutputError for a disk that refuses.
    """
    part = folder.with_name(f"{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        anatomy, source = teacher.anatomy, teacher.source
        with learning_routers(teacher.skeleton.model, anatomy, candidates=anatomy.top_k) as learning:
            judged = Judge(teacher, learning, heldout, length, states).judged(progress)
            batches = spoken_batches(corpus, length, source.placement.device, source.scratch.tokens)
            arrays = write_said(part, teacher, learning, batches, losses, states=states, progress=progress)
        np.save(part / _HELDOUT, judged.sums)
        np.save(part / _COUNTS, judged.counts)
        windows = [(window_name(window), len(window.tokens)) for window in corpus.windows]
        facts = {"digest": digest, "arrays": sorted(arrays), "windows": windows}
        (part / _FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
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


def _rows(windows: Sequence[Window], held: Sequence[tuple[str, int]]) -> dict[int, tuple[int, int]]:
    """Return by window, known by identity, where its rows begin and end in a cache that holds these, by name."""
    places, start = {}, 0
    for name, tokens in held:
        places[name] = (start, start + tokens)
        start += tokens
    return {id(window): places[window_name(window)] for window in windows}
