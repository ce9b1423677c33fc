"""``run``: a recipe from the first evaluation to the last, with the figures of every stage.

A run folder holds ``run.json`` (what the run was begun with, see ``run_past``), ``journal.jsonl`` (one fsynced line for
each finished stage), the checkpoints of the stages under ``stages/``, the last accepted one as ``checkpoint/`` (see
``run_end``), and at the very end ``figures.json``.
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
from moesurgeon.pipeline.options import SampleSpec, Writing
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.recipe import ProfileStep, Recipe, Step
from moesurgeon.pipeline.recipe_check import refuse_impossible
from moesurgeon.pipeline.recipe_file import recipe_of
from moesurgeon.pipeline.recipe_healing import healing_documents
from moesurgeon.pipeline.recipe_steps import recovery_of, step_on, usage_text
from moesurgeon.pipeline.recipe_text import read_recipe_text
from moesurgeon.pipeline.recover import recover
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.run_end import settle, writing
from moesurgeon.pipeline.run_folder import make_way, previous_of, refuse_finished, remove_previous
from moesurgeon.pipeline.run_past import FIGURES, Past, begin, digest_of, past_of
from moesurgeon.pipeline.sample import sample
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.document_hashes import Hashes

_ENDS = "ends"
_ENTROPY_TOKENS = 12288  # for a stage's utilisation figures; a cut is decided on the profile step's own


@dataclass(frozen=True, kw_only=True)
class RunOutput:
    """The folder of the run; ``overwrite`` replaces an earlier run in it."""

    output: Path
    overwrite: bool = False


def run(recipe_path: Path, output: RunOutput, progress: Progress = SILENT) -> dict[str, Any]:
    """Carry out the recipe and return the figures of the original and of every stage.

    A run of the same that was stopped goes on after its last finished step.
    """
    started = time.monotonic()
    text = read_recipe_text(recipe_path)
    recipe, folder = recipe_of(text), output.output
    if not output.overwrite:
        refuse_finished(folder)
    refuse_impossible(recipe, folder, text)
    subject = open_subject(recipe.checkpoint)
    healing = healing_documents(recipe, subject)
    digest = digest_of(recipe, subject)
    past = None if output.overwrite else past_of(folder, digest)
    if past is None:
        past = Past()
        make_way(folder, overwrite=output.overwrite)
        begin(folder, recipe_path, digest)
    else:
        progress.note(f"{folder}: going on after {len(past)} of {len(recipe.steps) + 1} steps")
    work = _Run(recipe, folder, past, healing, progress)
    work.through()
    end = settle(folder, work.stages)
    _log(folder, {"stage": "end", **end})
    figures = {
        "recipe": str(recipe_path),
        **end,
        "stages": work.stages,
        "seconds": time.monotonic() - started,
        **({"gate": work.gate} if work.gate else {}),
    }
    with writing(folder):
        write_whole(folder / FIGURES, json.dumps(figures, indent=2) + "\n")
    remove_previous(previous_of(folder))
    if work.ended is not None and (work.gate is None or work.gate["passed"]):
        why = f"{work.ended}; the run ends with {end['accepted']}, {end['checkpoint']}: see {folder / FIGURES}"
        raise type(work.ended)(why)
    return {"output": str(folder), **figures}


class _Run:
    """A run on its way: ``stages`` are the figures of all states so far, ``gate`` is the verdict on the last one.

    ``ended``: why a step wrote nothing, so that the run ends before it.
    """

    def __init__(self, recipe: Recipe, folder: Path, past: Past, healing: Hashes, progress: Progress) -> None:
        self._recipe, self._folder, self._past, self._progress = recipe, folder, past, progress
        self._healing = healing
        self._current = recipe.checkpoint
        self._taken: Path | None = None  # a profile of it
        self._own: list[str] = []
        self.stages: list[dict[str, Any]] = []
        self.gate: Mapping[str, Any] | None = None
        self.ended: GateFailed | NothingToDo | None = None

    def through(self) -> None:
        """Do what is not done of the recipe, up to a step after which it ends."""
        original = self._past.take("original")
        if original is None:
            place = self._folder / "usage" / "00-original"
            original = {**self._figures("original", self._recipe.checkpoint, place, {}), "accepted": True}
            _log(self._folder, original)
        self.stages.append(original)
        for number, step in enumerate(self._recipe.steps, start=1):
            place = self._folder / "stages" / f"{number:02d}-{step.name}"
            done = self._past.take(step.name)
            if done is None:
                self._progress.note(f"step {number} of {len(self._recipe.steps)}: {step.name}")
            if step.sample:
                self._sample(step.sample, place, is_done=done is not None)
            elif step.profile:
                self._profile(step.profile, place, is_done=done is not None)
            elif not self._write(number, step, place, done):
                break

    def _sample(self, spec: SampleSpec, place: Path, *, is_done: bool) -> None:
        path = place.with_name(f"{place.name}-{spec.domain}.jsonl")
        self._own.append(f"{spec.domain}={path}")
        if not is_done:
            recipe = self._recipe
            drawn = sample(recipe.checkpoint, path, spec, recipe.running, self._progress, overwrite=True)
            _log(self._folder, {"stage": "sample", **drawn, "path": str(path.relative_to(self._folder))})

    def _profile(self, asked: ProfileStep, place: Path, *, is_done: bool) -> None:
        self._taken = place
        if not is_done:
            text = self._recipe.text.profiled(asked.max_tokens)
            output = ProfileOutput(output=place, inner=asked.inner, overwrite=True)
            profile(self._current, output, text, self._recipe.running, self._progress)
            _log(self._folder, {"stage": "profile", "profile": str(place.relative_to(self._folder))})

    def _write(self, number: int, step: Step, place: Path, done: dict[str, Any] | None) -> bool:
        """Take the state that a step makes, or has made if it is ``done``; return whether the recipe goes on."""
        if done is None:
            try:
                done = self._stage(step, place)
            except (GateFailed, NothingToDo) as error:  # wrote nothing: what there is by now is the result
                self._progress.note(f"step {number}: {error}")
                _log(self._folder, {"stage": step.name, "accepted": False, "why": str(error)})
                self.ended = error
                self.gate = error.verdict if isinstance(error, GateFailed) else self.stages[-1].get("gate")
                return False
            _log(self._folder, done)
        self._current, self._taken = str(place), None
        failed = done.pop(_ENDS, None)
        self.stages.append({**done, "checkpoint": self._current})
        self.gate = failed or done.get("gate")
        if failed:
            self._progress.note(f"step {number}: a gate failed; the recipe ends with the last state that passed")
        return failed is None

    def _stage(self, step: Step, place: Path) -> dict[str, Any]:
        """Do a step that writes a checkpoint; return its figures, with the gate of its own that failed if one did.

        The recipe's gate is judged on every state, so that it is known which was the last to pass.
        """
        report = self._written(step_on(self._recipe, step, self._own), place)
        bare = self._bare(step, report)
        usage = self._folder / "usage" / place.name
        stage = {**self._figures(step.name, str(place), usage, report), **bare}
        failed = report.get("gate")
        return {
            **stage,
            "accepted": stage.get("gate", {"passed": True})["passed"],
            **({_ENDS: failed} if failed and not failed["passed"] else {}),
        }

    def _written(self, step: Step, target: Path) -> Mapping[str, Any]:
        recipe, progress = self._recipe, self._progress
        writing = Writing(output=target, overwrite=True)  # a step that was stopped may have left its checkpoint
        if step.retop:
            foresight = Foresight(profile=step.retop.profile or self._taken)
            spec, heal, running = step.retop.spec, step.heal, recipe.running
            return retop(self._current, spec, writing, progress, foresight=foresight, heal=heal, running=running)
        if step.prune:
            cut = step.prune
            if not (cut.profile or cut.keep_experts):
                cut = replace(cut, profile=self._taken)
            return prune(self._current, cut, writing, progress, recipe.running)
        assert step.recover is not None
        recovery, text = recovery_of(recipe, step.recover)
        writing = replace(writing, allow_noop=step.recover.allow_noop)
        return recover(self._current, recovery, text, recipe.running, writing, progress)

    def _bare(self, step: Step, report: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``bare``: the figures of a step that healed without its healing; of other steps nothing."""
        if report.get("healed", {}).get("method", "none") == "none":
            return {}
        recipe = self._recipe
        text = recipe.text.reported(recipe.report_tokens)
        found = bare_figures(self._current, step, report, text, recipe.running, self._progress, left_out=self._healing)
        return {"bare": {**found, "perplexity_ratio": found["perplexity"] / self.stages[0]["perplexity"]}}

    def _figures(self, stage: str, checkpoint: str, usage: Path, report: Mapping[str, Any]) -> dict[str, Any]:
        return _measured(self._recipe, stage, checkpoint, usage, report, self._progress, healing=self._healing)


def _log(folder: Path, entry: Mapping[str, Any]) -> None:
    with writing(folder):
        append(folder / JOURNAL, entry)


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
        ProfileOutput(output=usage_folder, overwrite=True),
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


def _gap_closed(report: Mapping[str, Any]) -> float | None:
    """Return the share of the loss gap that a step closed itself, of those that do."""
    if healing := report.get("healed"):
        return healing["gap_closed"] if healing["kept"] else 0.0
    closed: float | None = report.get("gap_closed")
    return closed
