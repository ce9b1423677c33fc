"""The cuts of ``prune_quality.py``: chosen by every criterion from one text, bare and healed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_reap import MISSING, is_installed, reap_of_llmcompressor
from benchmarks.quality_report import QUARTER, Results, Row, rise
from benchmarks.quality_text import Judge, Rows, Words
from moesurgeon.engine.batches import batches_of, rows_for
from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.errors import UsageError
from moesurgeon.healing.pace import Pace
from moesurgeon.pipeline.choice import choose_by
from moesurgeon.pipeline.heal import Healer, healer
from moesurgeon.pipeline.healed_choice import settled
from moesurgeon.pipeline.options import HealSpec, Running, SampleSpec, Text
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.sample import sample
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.text import read_text, window_length
from moesurgeon.profiling.artefact import Profile, load_profile
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.progress import SILENT
from moesurgeon.selection.choose import best
from moesurgeon.selection.criteria import scores_of
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import Kept, plan_prune
from moesurgeon.traces.windows import Corpus

PEER = "llm-compressor"
BESIDE = ("own", "uniform")
BESIDE_TOKENS = 131072
"""Enough that the calibration split of them, a seventh, is a domain's share of what is healed on."""
METHODS = ("bare", "scale", "ridge", "distill")
RUNNING = Running(device="cpu", dtype="float32")


class Round:
    """All cuts of a checkpoint by one calibration text: one profile, one healer for each method."""

    def __init__(
        self,
        subject: Subject,
        name: str,
        words: Words,
        judge: Judge,
        given: argparse.Namespace,
        rows: Rows,
        *,
        without: str | None,
        seed: int,
    ) -> None:
        self.subject, self.judge, self.given, self.rows, self.seed = subject, judge, given, rows, seed
        self.traces, self.split = words.calibration(without), words.split
        self.healed_on = self.traces
        layout = "coarse" if subject.anatomy.experts <= 8 else "fine"
        self.of: Row = {"checkpoint": name, "layout": layout, "without": without, "seed": seed}
        self.criteria = given.criteria if without is None else ["reap"]
        self.shares = given.shares if without is None else [QUARTER]
        self._healers: dict[str, Healer] = {}

    def run(self) -> None:
        missing = [
            (share, criterion)
            for share in self.shares
            for criterion in self.criteria
            if any(not self._has(share, criterion, method) for method in self.given.methods)
        ]
        if not missing:
            return
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            taken = self._profile(folder / "profile")
            for name in self.given.beside:
                spec = SampleSpec(tokens=BESIDE_TOKENS, uniform=name == "uniform", seed=self.seed)
                sample(self.subject.name, folder / f"{name}.jsonl", spec, RUNNING)
                self.healed_on += (f"{name}={folder / f'{name}.jsonl'}",)
            cuts = []
            for share, criterion in missing:
                keep = self.subject.anatomy.experts - round(self.subject.anatomy.experts * share)
                chosen = self._chosen(criterion, keep, taken, stack)
                if chosen is not None:
                    cuts.append((share, criterion, *chosen))
            for method in self.given.methods:
                for share, criterion, kept, facts in cuts:
                    if not self._has(share, criterion, method):
                        self._add(share, criterion, method, kept, facts, stack)

    def _has(self, share: float, criterion: str, method: str) -> bool:
        return self.rows.find(**self.of, share=share, criterion=criterion, method=method) is not None

    def _profile(self, folder: Path) -> Profile:
        text = Text(
            traces=self.traces, split=self.split or "calibration", max_tokens=self.given.profile_tokens,
            sample=self.seed,
        )  # fmt: skip
        profile(self.subject.name, ProfileOutput(output=folder, inner=self.given.inner), text, RUNNING)
        return load_profile(folder)

    def _chosen(self, criterion: str, keep: int, taken: Profile, stack: ExitStack) -> tuple[Kept, Row] | None:
        """Return what ``criterion`` keeps and facts about that; None, with a message, if it cannot be had."""
        if criterion == PEER:
            return self._chosen_by_peer(keep)
        spec = PruneSpec(keep=keep, criterion=criterion, seed=self.seed)
        try:
            if criterion == "healed":
                choice = choose_by(self.subject.anatomy, spec, taken)
                return settled(choice, self._healer(self._strongest, stack), self.subject.anatomy).kept, {}
            return choose_by(self.subject.anatomy, spec, taken).kept, {}
        except UsageError as error:
            skipped(f"{criterion} of {keep} experts: {error}")
            return None

    def _chosen_by_peer(self, keep: int) -> tuple[Kept, Row] | None:
        if not is_installed():
            skipped(f"{PEER}: {MISSING}")
            return None
        text = Text(traces=self.traces, split=self.split or "calibration", sample=self.seed,
                    max_tokens=self.given.profile_tokens)  # fmt: skip
        length = window_length(self.subject, text)
        batch = rows_for(length)
        windows = [
            window
            for window in read_text(self.subject, text, builtin_split="calibration").windows
            if len(window.tokens) == length
        ]
        windows = windows[: len(windows) // batch * batch]  # theirs leaves an incomplete batch out
        if not windows:
            skipped(f"{PEER}: the text has no {batch} windows of {length} tokens")
            return None
        anatomy = self.subject.anatomy
        theirs = reap_of_llmcompressor(
            self.subject.root, windows, length=length, batch=batch, experts=anatomy.experts, keep=keep
        )
        domains = tuple(dict.fromkeys(window.domain for window in windows))
        corpus = Corpus(windows=windows, tokens=dict.fromkeys(domains, 0))
        device = self.judge.source.placement.device
        sums = take_profile(Stream(self.judge.source), domains, list(batches_of(corpus, rows=batch, device=device)))
        ours = best(scores_of(sums, "reap"), anatomy.moe_layers, keep, anatomy.groups[0])
        same = sum(theirs.kept[layer] == ours[layer] for layer in anatomy.moe_layers)
        return theirs.kept, {"same_layers_as_reap": same, "layers": len(anatomy.moe_layers)}

    def _add(self, share: float, criterion: str, method: str, kept: Kept, facts: Row, stack: ExitStack) -> None:
        """Measure one cut, or take over what was measured of the same experts."""
        kept_json = {str(layer): list(experts) for layer, experts in kept.items()}
        # Bare, the calibration text is in the choice only.
        same = {"checkpoint": self.of["checkpoint"]} if method == "bare" else self.of
        known = self.rows.find(**same, method=method, kept=kept_json)
        row = {**self.of, "share": share, "keep": len(next(iter(kept.values()))), "criterion": criterion,
               "method": method, "kept": kept_json, **facts}  # fmt: skip
        if known is None:
            started, used = time.monotonic(), time.process_time()
            plan, healing = plan_prune(self.subject.anatomy, kept), dict[str, Any]()
            if method == "bare":
                losses = self.judge.losses(Stream(self.judge.source, Overlay(plan=plan)))
            else:
                open_healer = self._healer(method, stack)
                plan, report, _judged = open_healer.heal(plan)
                healing = {key: report[key] for key in ("heldout", "gap_closed", "kept")}
                losses = self.judge.losses(open_healer.student(plan))
            row |= {**losses, "healed": healing, "seconds": time.monotonic() - started,
                    "cpu_seconds": time.process_time() - used}  # fmt: skip
        else:
            row |= {key: known[key] for key in ("losses", "validation", "healed") if key in known}
            row["same_as"] = known["criterion"]
        self.rows.add(row)
        show(row, Results([{"text": row["checkpoint"], **self.judge.text}, row]))

    @property
    def _strongest(self) -> str:
        return next((method for method in reversed(METHODS[1:]) if method in self.given.methods), "ridge")

    def _healer(self, method: str, stack: ExitStack) -> Healer:
        if method not in self._healers:
            spec = HealSpec(
                traces=self.healed_on,
                method=method,  # type: ignore[arg-type]
                split=self.split,  # type: ignore[arg-type]
                max_tokens=self.given.tokens,
                heldout_tokens=self.given.heldout_tokens,
                sample=self.seed,
                pace=Pace(steps=self.given.steps, tokens_per_step=self.given.tokens_per_step, seed=self.seed),
            )
            self._healers[method] = stack.enter_context(
                healer(self.subject, spec, RUNNING, SILENT, like=self._largest_plan())
            )
        return self._healers[method]

    def _largest_plan(self) -> EditPlan:
        """Return the cut that leaves most: what memory is shared out for."""
        anatomy = self.subject.anatomy
        keep = anatomy.experts - round(anatomy.experts * min(self.shares))
        any_scores = np.zeros((len(anatomy.moe_layers), anatomy.experts))
        return plan_prune(anatomy, best(any_scores, anatomy.moe_layers, keep, anatomy.groups[0]))


_told: set[str] = set()


def skipped(message: str) -> None:
    """Say once that something is left out."""
    if message not in _told:
        _told.add(message)
        print(f"left out: {message}", file=sys.stderr, flush=True)


def show(row: Row, results: Results) -> None:
    value, low, high = rise(results.texts[row["checkpoint"]], np.array(row["losses"]))
    without = f" without {row['without']}" if row["without"] else ""
    took = f"as {row['same_as']}" if "same_as" in row else f"{row['seconds']:.0f} s, CPU {row['cpu_seconds']:.0f} s"
    print(
        f"{row['checkpoint']}{without} seed {row['seed']}  {row['share']:6.1%} by {row['criterion']:<15} "
        f"{row['method']:<8} rise {value:+7.1%} ({low:+.1%} to {high:+.1%})  {took}",
        flush=True,
    )
