"""``run``: a recipe from the first evaluation to the last, with the figures of every stage.

A run folder holds ``journal.jsonl`` (one fsynced line per finished stage), the checkpoints of the
stages under ``stages/``, the last accepted one as ``checkpoint/`` (see ``run_end``), and at the very end
``figures.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.whole_file import write_whole
from moesurgeon.errors import GateFailed, NothingToDo
from moesurgeon.pipeline.bare import bare_figures
from moesurgeon.pipeline.evaluate import EvaluateSpec, evaluate
from moesurgeon.pipeline.foresight import Foresight
from moesurgeon.pipeline.inspect import inspect
from moesurgeon.pipeline.journal import NAME as JOURNAL
from moesurgeon.pipeline.journal import append
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.recipe import Recipe, Step
from moesurgeon.pipeline.recipe_check import refuse_impossible
from moesurgeon.pipeline.recipe_file import recipe_of
from moesurgeon.pipeline.recipe_healing import healing_documents
from moesurgeon.pipeline.recipe_steps import recovery_of, step_on, usage_text
from moesurgeon.pipeline.recipe_text import read_recipe_text
from moesurgeon.pipeline.recover import recover
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.run_end import settle, writing
from moesurgeon.pipeline.run_folder import make_way, remove_previous
from moesurgeon.pipeline.sample import sample
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.document_hashes import Hashes

_FIGURES = "figures.json"
_ENTROPY_TOKENS = 12288  # for a stage's utilisation figures; a cut is decided on the profile step's own


@dataclass(frozen=True, kw_only=True)
class RunOutput:
    """The folder of the run; ``overwrite`` replaces an earlier run in it."""

    output: Path
    overwrite: bool = False


def run(recipe_path: Path, output: RunOutput, progress: Progress = SILENT) -> dict[str, Any]:
    """Carry out the recipe and return the figures of the original and of every stage."""
    text = read_recipe_text(recipe_path)
    recipe = recipe_of(text)
    refuse_impossible(recipe, output.output, text)
    folder = output.output
    started = time.monotonic()
    healing = healing_documents(recipe, open_subject(recipe.checkpoint))
    previous = make_way(folder, overwrite=output.overwrite)
    place = folder / "usage" / "00-original"
    original = _measured(recipe, "original", recipe.checkpoint, place, {}, progress, healing=healing)
    stages = [{**original, "accepted": True}]
    _log(folder, stages[-1])
    current, taken = recipe.checkpoint, None
    own: list[str] = []
    gate: Mapping[str, Any] | None = None
    ended: GateFailed | NothingToDo | None = None
    for number, step in enumerate(recipe.steps, start=1):
        progress.note(f"step {number} of {len(recipe.steps)}: {step.name}")
        place = folder / "stages" / f"{number:02d}-{step.name}"
        if not step.writes:
            taken = _prepared(recipe, step, current, place, own, progress) or taken
            continue
        try:
            report = _write(recipe, step_on(recipe, step, own), current, taken, place, progress)
        except (GateFailed, NothingToDo) as error:  # wrote nothing: what there is by now is the result
            progress.note(f"step {number}: {error}")
            _log(folder, {"stage": step.name, "accepted": False, "why": str(error)})
            ended, gate = error, error.verdict if isinstance(error, GateFailed) else stages[-1].get("gate")
            break
        bare = _bare(recipe, step, current, report, stages[0], progress, healing=healing)
        current, taken = str(place), None
        usage_folder = folder / "usage" / f"{number:02d}-{step.name}"
        stage = {**_measured(recipe, step.name, current, usage_folder, report, progress, healing=healing), **bare}
        # The recipe's gate is judged on every state, so that it is known which was the last to pass.
        stages.append({**stage, "accepted": stage.get("gate", {"passed": True})["passed"]})
        _log(folder, stages[-1])
        gate = stage.get("gate")
        if (failed := report.get("gate")) and not failed["passed"]:
            progress.note(f"step {number}: a gate failed; the recipe ends with the last state that passed")
            gate = failed
            break
    end = settle(folder, stages)
    _log(folder, {"stage": "end", **end})
    figures = {
        "recipe": str(recipe_path),
        **end,
        "stages": stages,
        "seconds": time.monotonic() - started,
        **({"gate": gate} if gate else {}),
    }
    with writing(folder):
        write_whole(folder / _FIGURES, json.dumps(figures, indent=2) + "\n")
    remove_previous(previous)
    if ended is not None and (gate is None or gate["passed"]):
        raise type(ended)(f"{ended}; the run ends with {end['accepted']}, {end['checkpoint']}: see {folder / _FIGURES}")
    return {"output": str(folder), **figures}


def _prepared(recipe: Recipe, step: Step, current: str, place: Path, own: list[str], progress: Progress) -> Path | None:
    """Do one step that writes no checkpoint; return the profile that it took. What it sampled is added to ``own``."""
    folder = place.parents[1]
    if step.sample:
        path = place.with_name(f"{place.name}-{step.sample.domain}.jsonl")
        drawn = sample(recipe.checkpoint, path, step.sample, recipe.running, progress)
        own.append(f"{step.sample.domain}={path}")
        _log(folder, {"stage": step.name, **drawn, "path": str(path.relative_to(folder))})
        return None
    assert step.profile is not None
    text = recipe.text.profiled(step.profile.max_tokens)
    profile(current, ProfileOutput(output=place, inner=step.profile.inner), text, recipe.running, progress)
    _log(folder, {"stage": step.name, "profile": str(place.relative_to(folder))})
    return place


def _log(folder: Path, entry: Mapping[str, Any]) -> None:
    with writing(folder):
        append(folder / JOURNAL, entry)


def _write(
    recipe: Recipe, step: Step, current: str, taken: Path | None, target: Path, progress: Progress
) -> Mapping[str, Any]:
    """Do one step that writes a checkpoint."""
    if step.retop:
        foresight = Foresight(profile=step.retop.profile or taken)
        return retop(
            current,
            step.retop.spec,
            Writing(output=target),
            progress,
            foresight=foresight,
            heal=step.heal,
            running=recipe.running,
        )
    if step.prune:
        spec = step.prune if step.prune.profile or step.prune.keep_experts else replace(step.prune, profile=taken)
        return prune(current, spec, Writing(output=target), progress, recipe.running)
    assert step.recover is not None
    spec_, text = recovery_of(recipe, step.recover)
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
    healing: Hashes,
) -> dict[str, Any]:
    """Return the figures of one stage: size, cost, held-out quality (with a gate's verdict), balance, speed."""
    facts = inspect(checkpoint)
    against = None if stage == "original" else recipe.checkpoint
    spec = EvaluateSpec(gates=(recipe.gate,) if against and recipe.gate else (), left_out=healing)
    text = recipe.text.reported(recipe.report_tokens)
    quality = evaluate(checkpoint, against, text, recipe.running, progress, spec)
    usage = profile(
        checkpoint,
        ProfileOutput(output=usage_folder),
        usage_text(recipe, _ENTROPY_TOKENS),
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


def _bare(
    recipe: Recipe,
    step: Step,
    source: str,
    report: Mapping[str, Any],
    original: Mapping[str, Any],
    progress: Progress,
    *,
    healing: Hashes,
) -> dict[str, Any]:
    """Return ``bare``: the figures of a step that healed without its healing; of other steps nothing."""
    if report.get("healed", {}).get("method", "none") == "none":
        return {}
    text = recipe.text.reported(recipe.report_tokens)
    found = bare_figures(source, step, report, text, recipe.running, progress, left_out=healing)
    return {"bare": {**found, "perplexity_ratio": found["perplexity"] / original["perplexity"]}}


def _gap_closed(report: Mapping[str, Any]) -> float | None:
    """Return the share of the loss gap that a step closed itself, of those that do."""
    if healing := report.get("healed"):
        return healing["gap_closed"] if healing["kept"] else 0.0
    closed: float | None = report.get("gap_closed")
    return closed
