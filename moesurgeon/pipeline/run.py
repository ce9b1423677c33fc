"""``run``: a recipe from the first evaluation to the last, with the figures of every stage.

A run folder holds ``journal.jsonl`` (one fsynced line per finished stage), the checkpoints of the
stages under ``stages/``, the last one as ``checkpoint/``, and at the very end ``figures.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesurgeon.checkpoint.staging import refuse_unusable
from moesurgeon.engine import device
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.evaluate import EvaluateSpec, evaluate, read_gate
from moesurgeon.pipeline.heal import check_heal
from moesurgeon.pipeline.inspect import inspect
from moesurgeon.pipeline.options import HealSpec, Text, Writing
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.recipe import Recipe, Step, read_recipe
from moesurgeon.pipeline.recover import RecoverSpec, recover
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.text import trace_specs, window_length
from moesurgeon.progress import SILENT, Progress
from moesurgeon.recovery.objective import refuse_without_gradient
from moesurgeon.selection.choose import best, count_to_keep
from moesurgeon.surgery.prune import check_count, plan_prune
from moesurgeon.surgery.retop import plan_retop
from moesurgeon.traces.documents import Split

_JOURNAL, _FIGURES = "journal.jsonl", "figures.json"
_ENTROPY_TOKENS = 12288  # for a stage's utilisation figures; a cut is decided on the profile step's own


@dataclass(frozen=True, kw_only=True)
class RunOutput:
    """The folder of the run; ``overwrite`` replaces an earlier run in it."""

    output: Path
    overwrite: bool = False


def run(recipe_path: Path, output: RunOutput, progress: Progress = SILENT) -> dict[str, Any]:
    """Carry out the recipe and return the figures of the original and of every stage."""
    recipe = read_recipe(recipe_path)
    _refuse_impossible(recipe, output)
    folder = output.output
    previous = _make_way(output)
    started = time.monotonic()
    stages = [_measured(recipe, "original", recipe.checkpoint, folder / "usage" / "00-original", {}, progress)]
    _log(folder, stages[-1])
    current, taken = recipe.checkpoint, None
    writing_steps = [number for number, step in enumerate(recipe.steps, start=1) if step.name != "profile"]
    for number, step in enumerate(recipe.steps, start=1):
        progress.note(f"step {number} of {len(recipe.steps)}: {step.name}")
        place = folder / "stages" / f"{number:02d}-{step.name}"
        if step.profile:
            text = replace(recipe.text, split=recipe.text.split or "calibration", max_tokens=step.profile.max_tokens)
            profile(current, ProfileOutput(output=place), text, recipe.running, progress)
            taken = place
            _log(folder, {"stage": step.name, "profile": str(place.relative_to(folder))})
            continue
        last = number == writing_steps[-1]
        target = folder / "checkpoint" if last else place
        report = _write(recipe, step, current, taken, target, progress)
        current = str(target)
        usage_folder = folder / "usage" / f"{number:02d}-{step.name}"
        spec = EvaluateSpec(gates=(recipe.gate,)) if last and recipe.gate else None
        stages.append(_measured(recipe, step.name, current, usage_folder, report, progress, spec=spec))
        _log(folder, stages[-1])
    figures = {
        "recipe": str(recipe_path),
        "checkpoint": current,
        "stages": stages,
        "seconds": time.monotonic() - started,
        **({"gate": gate} if (gate := stages[-1].pop("gate", None)) else {}),
    }
    _write_whole(folder / _FIGURES, json.dumps(figures, indent=2) + "\n")
    if (previous / _JOURNAL).is_file():
        shutil.rmtree(previous)
    return {"output": str(folder), **figures}


def _refuse_impossible(recipe: Recipe, output: RunOutput) -> None:
    """Raise now, from headers alone, what a step would raise after the work of those before it."""
    subject = open_subject(recipe.checkpoint)
    refuse_unusable(output.output, overwrite=True, sources=(subject.root,))
    device.place(recipe.running.device, recipe.running.dtype, subject.stored_dtype)
    window_length(subject, recipe.text)
    trace_specs(recipe.text)
    if recipe.gate:
        read_gate(subject, recipe.text, EvaluateSpec(gates=(recipe.gate,)), has_teacher=True)
    anatomy = subject.anatomy
    for step in recipe.steps:
        if step.heal:
            check_heal(_healing(recipe, step.heal))
            if step.retop and step.heal.merge:
                raise UsageError("heal: {merge: true} is for prune: retop drops no experts that could be folded")
        if step.retop:
            anatomy = plan_retop(anatomy, step.retop.spec).result(anatomy)
        elif step.prune and step.prune.keep_experts is None:
            asked = step.prune
            count = count_to_keep(anatomy.experts, keep=asked.keep, ratio=asked.ratio, below=asked.below)
            if count is None:  # how many go is for the profile to say, too
                continue
            check_count(anatomy, count)
            # Which experts is for the profile to say; here any will do.
            scores = np.zeros((len(anatomy.moe_layers), anatomy.experts))
            anatomy = plan_prune(anatomy, best(scores, anatomy.moe_layers, count, anatomy.groups[0])).result(anatomy)
        elif step.recover:
            refuse_without_gradient(anatomy, step.recover.losses.objective)


def _text(recipe: Recipe, split: Split, max_tokens: int | None) -> Text:
    """Return the recipe's text to measure on: what calibrates is not what is reported on."""
    return recipe.text.even(split=recipe.text.split or split, max_tokens=max_tokens)


def _healing(recipe: Recipe, heal: HealSpec) -> HealSpec:
    """Return ``heal`` with the recipe's text and first checkpoint (as teacher) where it names none."""
    return replace(
        heal,
        traces=heal.traces or recipe.text.traces,
        length=heal.length or recipe.text.length,
        teacher=heal.teacher or recipe.checkpoint,
    )


def _write(
    recipe: Recipe, step: Step, current: str, taken: Path | None, target: Path, progress: Progress
) -> Mapping[str, Any]:
    """Do one step that writes a checkpoint."""
    heal = _healing(recipe, step.heal) if step.heal else None
    if step.retop:
        return retop(current, step.retop.spec, Writing(output=target), progress, heal=heal, running=recipe.running)
    if step.prune:
        spec = step.prune if step.prune.profile or step.prune.keep_experts else replace(step.prune, profile=taken)
        return prune(current, replace(spec, heal=heal), Writing(output=target), progress, recipe.running)
    assert step.recover is not None
    spec_ = RecoverSpec(
        teacher=recipe.checkpoint,
        losses=step.recover.losses,
        schedule=step.recover.schedule,
        heldout_tokens=step.recover.heldout_tokens,
    )
    text = replace(recipe.text, max_tokens=step.recover.max_tokens)
    writing = Writing(output=target, allow_noop=step.recover.allow_noop)
    return recover(current, spec_, text, recipe.running, writing, progress)


def _measured(
    recipe: Recipe,
    stage: str,
    checkpoint: str,
    usage_folder: Path,
    report: Mapping[str, Any],
    progress: Progress,
    *,
    spec: EvaluateSpec | None = None,
) -> dict[str, Any]:
    """Return the figures of one stage: size, cost, held-out quality (with a gate's verdict), balance, speed."""
    facts = inspect(checkpoint)
    against = None if stage == "original" else recipe.checkpoint
    text = _text(recipe, "report", recipe.report_tokens)
    quality = evaluate(checkpoint, against, text, recipe.running, progress, spec)
    usage = profile(
        checkpoint,
        ProfileOutput(output=usage_folder),
        _text(recipe, "calibration", _ENTROPY_TOKENS),
        recipe.running,
        progress,
    )
    layers = usage["layers"].values()
    return {
        "stage": stage,
        "checkpoint": checkpoint,
        "parameters": facts["parameters"],
        "flops_per_token": facts["flops_per_token"]["total"],
        "bytes": facts["bytes"],
        "experts": facts["experts"],
        "top_k": facts["top_k"],
        "loss": quality["loss"],
        "perplexity": quality["perplexity"],
        "interval": quality["interval"],
        "perplexity_ratio": quality["against"]["perplexity_ratio"] if against else 1.0,
        "ratio_interval": quality["against"]["interval"] if against else [1.0, 1.0],
        "domains": {domain: figures["perplexity"] for domain, figures in quality["domains"].items()},
        "utilization_entropy": sum(layer["entropy"] for layer in layers) / len(layers),
        "max_over_mean": max(layer["max_over_mean"] for layer in layers),
        "tokens_per_second": quality["tokens_per_second"],
        "gap_closed": _gap_closed(report),
        **({"gate": quality["gate"]} if "gate" in quality else {}),
    }


def _gap_closed(report: Mapping[str, Any]) -> float | None:
    """Return the share of the loss gap that a step closed itself, of those that do."""
    if healing := report.get("healed"):
        return healing["gap_closed"] if healing["kept"] else 0.0
    closed: float | None = report.get("gap_closed")
    return closed


def _make_way(output: RunOutput) -> Path:
    """Make the run folder; return where an earlier run waits until this one is complete.

    Only the folder of a run is ever replaced, and only on request. Where this run fails, the earlier
    one is kept beside it as ``NAME.previous``.
    """
    folder = output.output
    previous = folder.with_name(f"{folder.name}.previous")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / _JOURNAL).is_file() or not (folder / "stages").is_dir():
            raise UsageError(f"{folder} exists and is not the folder of a run; choose another")
        if not output.overwrite:
            raise UsageError(f"{folder} holds a run already; choose another folder or add --overwrite")
        if (previous / _JOURNAL).is_file():  # then what is in the folder failed
            shutil.rmtree(folder)
        else:
            folder.rename(previous)
    (folder / "stages").mkdir(parents=True)
    (folder / _JOURNAL).touch()
    return previous


def _log(folder: Path, entry: Mapping[str, Any]) -> None:
    with (folder / _JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(entry) + "\n")
        journal.flush()
        os.fsync(journal.fileno())


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
