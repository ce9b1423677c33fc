"""The ways to fewer experts per token that ``recover_quality.py`` compares, each measured once or by seed."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_cuts import RUNNING
from benchmarks.quality_report import Row
from benchmarks.quality_text import Rows, Words, report_of
from benchmarks.recover_control import control
from benchmarks.recover_report import Results, told
from moesurgeon.engine.device import place
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.engine.whole import load_model
from moesurgeon.healing.pace import Method, Pace
from moesurgeon.pipeline.options import HealSpec, Text, Writing
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recover import RecoverSpec, recover
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.text import read_text, window_length
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.floor import use_of
from moesurgeon.recovery.judge import Judge, Judgement
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.targets import Adapt
from moesurgeon.surgery.retop import RetopSpec
from moesurgeon.traces.budgets import named_values, shares_of
from moesurgeon.traces.spec import parse_traces


@dataclass(frozen=True)
class Way:
    """``heal``: the layers, first; ``adapt``: what is recovered end to end, after that; ``cut``: a quarter of the
    experts goes, too. ``balance``: of the recovery, None: its default. The control starts from the bare checkpoint."""

    heal: Method | None = None
    adapt: tuple[Adapt, ...] = ()
    balance: float | None = None
    cut: bool = False
    is_control: bool = False

    @property
    def has_seed(self) -> bool:
        return self.heal == "distill" or bool(self.adapt) or self.is_control

    @property
    def start(self) -> Way:
        """What the end-to-end recovery begins from, a way of its own."""
        return replace(self, adapt=(), balance=None, is_control=False)


EXPERTS: tuple[Adapt, ...] = ("experts-all",)
BOTH: tuple[Adapt, ...] = ("routers", "experts-all")
WAYS = {
    "bare": Way(),
    "scale": Way("scale"),
    "ridge": Way("ridge"),
    "layers": Way("distill"),
    "layers, routers": Way("distill", ("routers",)),
    "layers, experts": Way("distill", ("experts",)),
    "layers, experts-all": Way("distill", EXPERTS),
    "layers, all": Way("distill", BOTH),
    "layers, all, balance 0": Way("distill", BOTH, balance=0.0),
    "layers, all, balance 0.1": Way("distill", BOTH, balance=0.1),
    "experts-all": Way(None, EXPERTS),
    "control": Way(is_control=True),
    "cut": Way(cut=True),
    "cut, layers": Way("distill", cut=True),
    "cut, layers, experts-all": Way("distill", EXPERTS, cut=True),
}


class Referee:
    """The report text and what the original makes of it."""

    def __init__(self, subject: Subject, words: Words) -> None:
        self.corpus = report_of(subject, words)
        self.length = window_length(subject, words.report)
        uncut = self.judged(subject)
        measured = uncut.measured
        keys = np.stack([measured.domain, measured.document], axis=1)
        documents, self._number = np.unique(keys, axis=0, return_inverse=True)
        self._number = self._number.reshape(-1)
        self.text = {
            "domains": list(measured.domains),
            "domain": documents[:, 0].tolist(),
            "positions": np.bincount(self._number, measured.positions).tolist(),
            "teacher": self.losses(uncut),
        }

    def judged(self, subject: Subject, change: Callable[[Any], Any] = lambda model: model) -> Judgement:
        """Return losses and use of the checkpoint, after ``change`` to the loaded model."""
        placement = place(RUNNING.device, RUNNING.dtype, subject.stored_dtype)
        model = change(load_model(subject.checkpoint, subject.anatomy, placement))
        with learning_routers(model, subject.anatomy, candidates=None) as learning:
            judged = Judge(Stream(Source.of_model(model, subject.anatomy)), learning, self.corpus, self.length).judged()
        del model
        gc.collect()
        return judged

    def losses(self, judged: Judgement) -> list[float]:
        """Return the sum of nats of each document."""
        return [round(float(loss), 6) for loss in np.bincount(self._number, judged.sums)]


class Operation:
    """One checkpoint with fewer experts per token, in every way."""

    def __init__(
        self,
        subject: Subject,
        name: str,
        top_k: int,
        words: Words,
        referee: Referee,
        *,
        given: argparse.Namespace,
        rows: Rows,
        folder: Path,
    ) -> None:
        self.subject, self.top_k, self.words, self.referee = subject, top_k, words, referee
        self.given, self.rows, self.folder = given, rows, folder
        self.of: Row = {"checkpoint": name, "top_k": [subject.anatomy.top_k, top_k]}
        self.traces = tuple(words.traces.values())
        self._bare: dict[bool, Judgement] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self, name: str) -> None:
        """Measure a way with each seed, but for what there is a row of."""
        way = WAYS[name]
        for seed in range(self.given.seeds if way.has_seed else 1):
            if self.rows.find(**self.of, way=name, seed=seed) is None:
                row = {**self.of, "way": name, "seed": seed, **self._measured(way, seed)}
                self.rows.add(row)
                print(
                    told(Results([{"text": row["checkpoint"], **self.referee.text}, *self.rows.all]), row), flush=True
                )

    def _measured(self, way: Way, seed: int) -> Row:
        if way.adapt or way.is_control:  # what it starts from is a row of its own, with its own cost
            start = self._start(way.start, seed)
        started, used = time.monotonic(), time.process_time()
        facts: Row = {}
        if way.is_control:
            subject = open_subject(str(start))
            text = read_text(subject, self._text(), builtin_split="calibration")
            judged = self.referee.judged(
                subject, lambda model: control(model, subject.anatomy, text, self.referee.length, self.given, seed)
            )
            facts = {"steps": self.given.steps, "tokens": self.given.steps * self.given.tokens_per_step}
        elif way.adapt:
            output = self._path(way, seed)
            facts = self._recovered(way, seed, start, output)
            judged = self.referee.judged(open_subject(str(output)))
        else:
            judged = self.referee.judged(open_subject(str(self._start(way, seed))))
            facts = {"tokens": self._healed_on() if way.heal else 0}
        cost = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - used}
        anatomy = self.subject.anatomy if not way.cut else open_subject(str(self._start(Way(cut=True), 0))).anatomy
        usage = use_of(anatomy, self._bare_of(way.cut), judged)
        return {"losses": self.referee.losses(judged), "usage": usage, **facts, **cost}

    def _bare_of(self, cut: bool) -> Judgement:
        if cut not in self._bare:
            self._bare[cut] = self.referee.judged(open_subject(str(self._start(Way(cut=cut), 0))))
        return self._bare[cut]

    def _start(self, way: Way, seed: int) -> Path:
        """Return the checkpoint of a way without end-to-end recovery, made if it is not there."""
        output = self._path(way, seed if way.has_seed else 0)
        if output.exists():
            return output
        heal = None
        if way.heal is not None:
            heal = HealSpec(
                traces=self.traces, method=way.heal, split=self.given.heal_split, max_tokens=self.given.heal_tokens,
                budgets=named_values("--heal-budget", self.given.heal_budget), teacher=self.subject.name,
                pace=Pace(steps=self.given.heal_steps, seed=seed),
            )  # type: ignore[arg-type]  # fmt: skip
        if not way.cut:
            retop(self.subject.name, RetopSpec(top_k=self.top_k), Writing(output=output), heal=heal, running=RUNNING)
            return output
        whole = self._start(Way(), 0)
        taken = self.folder / f"profile {self.top_k}"
        if not taken.exists():
            text = Text(traces=self.traces, split=self.words.split, max_tokens=98304)  # type: ignore[arg-type]
            profile(str(whole), ProfileOutput(output=taken), text, RUNNING)
        spec = PruneSpec(profile=taken, ratio=0.25, heal=heal)
        prune(str(whole), spec, Writing(output=output), running=RUNNING)
        return output

    def _recovered(self, way: Way, seed: int, start: Path, output: Path) -> Row:
        given, losses = self.given, Losses()
        if way.balance is not None:
            losses = replace(losses, balance=way.balance)
        schedule = Schedule(
            steps=given.steps, tokens_per_step=given.tokens_per_step, learning_rate=given.learning_rate,
            expert_rate=given.expert_rate, rank=given.rank, candidates=given.candidates, seed=seed,
        )  # fmt: skip
        spec = RecoverSpec(
            teacher=self.subject.name, adapt=way.adapt, losses=losses, schedule=schedule,
            heldout_tokens=given.heldout_tokens, cache=self.folder / "teacher",
        )  # fmt: skip
        writing = Writing(output=output, overwrite=True, allow_noop=True)
        report = recover(str(start), spec, self._text(), RUNNING, writing)
        learnt = {name: report[name] for name in ("loss_before", "loss_after", "teacher_loss", "gap_closed", "steps")}
        best = min(report["log"], key=lambda entry: entry["heldout"])["step"]
        return {**learnt, "best_step": best, "tokens": report["steps"] * given.tokens_per_step,
                "trained": report["trained_parameters"]}  # fmt: skip

    def _text(self) -> Text:
        """Return what is recovered on."""
        budgets = named_values("--budget", self.given.budget)
        return Text(traces=self.traces, split=self.given.split, max_tokens=self.given.tokens, budgets=budgets)

    def _healed_on(self) -> int:
        """Return the tokens that healing is given, of which short traces may have less."""
        domains = [spec.domain for spec in parse_traces(self.traces)]
        shares = shares_of(domains, self.given.heal_tokens, named_values("--heal-budget", self.given.heal_budget))
        return sum(share or 0 for share in shares.values())

    def _path(self, way: Way, seed: int) -> Path:
        name = next(name for name, known in WAYS.items() if known == way)
        return self.folder / f"{name} {self.top_k} {seed}"
