"""``harness``: tasks of the lm-evaluation-harness on a checkpoint of any size."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.budget import Demand, share_out
from moesurgeon.engine.device import place
from moesurgeon.engine.memory_use import MemoryUse
from moesurgeon.engine.model import context_length
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.engine.working import ALONE
from moesurgeon.errors import CheckpointError, InputError, MoeSurgeonError, UsageError
from moesurgeon.pipeline.decoding import ends_of, refuse_spread, whole
from moesurgeon.pipeline.options import Running
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.walking import hidden_folder
from moesurgeon.progress import SILENT, Progress

_INSTALL = "pip install 'moesurgeon[harness]'"
_RESAMPLES = 1000  # for standard errors of metrics that have no formula
_FEWSHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True, kw_only=True)
class HarnessSpec:
    """``tasks``: names or paths of YAML files; ``folder`` holds more tasks; ``limit`` examples of each at most."""

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None


def harness(source: str, spec: HarnessSpec, running: Running, progress: Progress = SILENT) -> dict[str, Any]:
    """Run the tasks and return their results, by lm-eval's names (``METRIC,FILTER``)."""
    tasks = _loaded(spec)
    subject = open_subject(source)
    placement = place(running.device, running.dtype, subject.stored_dtype)
    from moesurgeon.evaluation.harness import Batches, Reading, WalkingModel

    reading = Reading(_tokenizer(subject), context_length(subject.anatomy), ends_of(subject))
    with Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement) as walked:
        used: list[MemoryUse] = []

        def share(batched: Batches, who: str | None = None) -> MemoryUse:
            used.append(
                share_out(
                    running.max_memory, [walked], lambda tokens: Demand(batches=batched(tokens), logits=ALONE),
                    whole=who,
                )
            )  # fmt: skip
            if (note := used[-1].note) and note not in {before.note for before in used[:-1]}:
                progress.note(note)
            return used[-1]

        @contextmanager
        def resident() -> Iterator[Any]:
            refuse_spread(placement, "a task that generates text")
            share(lambda _tokens: [], "a task that generates text")
            with whole(walked) as model:
                yield model

        @contextmanager
        def fit(batched: Batches) -> Iterator[tuple[Sequence[Batch], Path | None]]:
            memory = share(cache(batched))
            with hidden_folder(not memory.hidden_in_files) as folder:
                yield batched(memory.scratch.tokens), folder

        model = WalkingModel(Stream(walked), reading, fit, resident, progress)
        results = _evaluated(model, tasks, spec.limit)
    import lm_eval

    return {
        "checkpoint": source,
        "harness_version": lm_eval.__version__,
        "placement": str(placement),
        "resident": all(each.resident for each in used),
        "memory": [each.as_dict() for each in used],
        "limit": spec.limit,
        "tasks": {name: _figures(found) for name, found in results["results"].items()},
        "samples": {name: counts["effective"] for name, counts in results["n-samples"].items()},
        "versions": results["versions"],
    }


def _loaded(spec: HarnessSpec) -> Any:
    """Return the tasks as lm-eval loads them; InputError for what it cannot load."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            f"the lm-evaluation-harness is not installed ({error.name}); install it: {_INSTALL}"
        ) from error
    if spec.folder is not None and not spec.folder.is_dir():
        raise UsageError(f"--tasks-folder {spec.folder} is no folder; give one that holds YAML files")
    for task in spec.tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise UsageError(f"--task {task}: there is no such file; give a task's name or its YAML file")
    with _quiet():
        manager: Any = TaskManager(include_path=spec.folder, include_defaults=False)
        if not all(Path(task).is_file() or task in manager.all_tasks for task in spec.tasks):
            manager = TaskManager(include_path=spec.folder)  # reads thousands of files
        for task in spec.tasks:
            if not Path(task).is_file() and task not in manager.all_tasks:
                raise UsageError(
                    f"--task {task}: lm-eval has no such task; see `lm-eval ls tasks`, or add --tasks-folder DIR"
                )
        try:
            loaded = manager.load(list(spec.tasks))
        except Exception as error:  # its YAML, templates and data sets raise anything
            raise InputError(
                f"the task cannot be loaded: {_said(error)}; correct its YAML, or fetch its data"
            ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _evaluated(model: Any, tasks: Any, limit: int | None) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate

    try:
        with _quiet():
            results: Mapping[str, Any] = evaluate(
                model, tasks, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False
            )
    except MoeSurgeonError:
        raise
    except Exception as error:
        if model.is_at_work:
            raise
        raise InputError(f"a task failed: {_said(error)}; correct its YAML or its data") from error
    return results


def _tokenizer(subject: Subject) -> Any:
    """Return the tokenizer as lm-eval uses it, which also decodes."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(subject.root, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # OSError, ValueError, ImportError, KeyError: it depends on the class
        raise CheckpointError(
            f"{subject.root}: transformers cannot load its tokenizer ({_said(error)}); copy it from the original "
            "checkpoint"
        ) from error


def _figures(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a task's results; None for those that could not be computed."""
    figures: dict[str, float | None] = {}
    for name, value in found.items():
        if "," not in name:
            continue
        is_number = isinstance(value, int | float) and math.isfinite(value)
        figures[name] = float(value) if is_number else None
    return figures


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what lm-eval prints off both streams, and its resampling in this process."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
