"""Recipes: a whole operation in YAML, checked before anything runs; ``recipe_file`` reads them.

The steps fill the same objects as the commands' options:

    checkpoint: builtin:tiny-mixtral
    text: {traces: [builtin:all]}
    steps:
      - retop: {top_k: 1, heal: {method: ridge}}
      - profile: {max_tokens: 49152}
      - prune: {keep: 6, criterion: reap, heal: {pace: {steps: 300}}}
      - recover: {schedule: {steps: 150}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moesurgeon.pipeline.options import HealSpec, Running, SampleSpec
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.text_roles import RoleText
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.targets import Adapt, Kind
from moesurgeon.surgery.retop import RetopSpec

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_Tokens = Annotated[int, Field(ge=8)]


class RecoverStep(BaseModel):
    """``recover`` with the recipe's checkpoint as teacher; ``allow_noop`` keeps the start if nothing beats it."""

    model_config = _STRICT

    adapt: Annotated[tuple[Adapt, ...], Field(min_length=1)] = ("experts-all",)
    adapter: Kind = "lora"
    changed: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    losses: Losses = Losses()
    schedule: Schedule = Schedule()
    max_tokens: _Tokens | None = 524288
    heldout_tokens: _Tokens = 16384
    allow_noop: bool = False
    cache: Path | None = None
    log: Path | None = None
    tensorboard: Path | None = None
    save_adapter: Path | None = None
    streamed: bool = False


class RetopStep(BaseModel):
    """``retop``, healed if ``heal`` says how.

    ``profile``: says beforehand where routing would collapse (None: that of the step before, if it was a profile).
    """

    model_config = _STRICT

    top_k: Annotated[int, Field(ge=1)] = RetopSpec().top_k
    profile: Path | None = None
    heal: HealSpec | None = None

    @property
    def spec(self) -> RetopSpec:
        return RetopSpec(top_k=self.top_k)


class ProfileStep(BaseModel):
    """``profile`` of the checkpoint as it is at this step; ``inner``: with inner products of so many tokens."""

    model_config = _STRICT

    max_tokens: _Tokens | None = 65536
    inner: Annotated[int, Field(ge=1)] | None = None


class Step(BaseModel):
    """One operation; exactly one key is given. ``sample``: text that the recipe's checkpoint draws from itself, which
    every later step heals on as well."""

    model_config = _STRICT

    sample: SampleSpec | None = None
    retop: RetopStep | None = None
    profile: ProfileStep | None = None
    prune: PruneSpec | None = None
    recover: RecoverStep | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError("a step has exactly one key: sample, retop, profile, prune or recover")
        return self

    @property
    def name(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def writes(self) -> bool:
        """Whether a checkpoint comes of it."""
        return self.profile is None and self.sample is None

    @property
    def heal(self) -> HealSpec | None:
        """What heals this step's cut."""
        step = self.retop or self.prune
        return step.heal if step else None


class Recipe(BaseModel):
    """``text`` is what profiles, healing, recovery and evaluations read; ``report_tokens`` bounds the last.

    ``gate``: a condition on the evaluation of the result against the original (``evaluation.gate``).
    """

    model_config = _STRICT

    checkpoint: str
    text: RoleText = RoleText()
    running: Running = Running()
    report_tokens: _Tokens = 65536
    gate: str | None = None
    steps: tuple[Step, ...]

    @model_validator(mode="after")
    def _has_text(self) -> Recipe:
        if self.text.problem:
            raise ValueError(f"text: {self.text.problem}")
        return self

    @model_validator(mode="after")
    def _has_profiles(self) -> Recipe:
        taken: ProfileStep | None = None
        for step in self.steps:
            given = step.prune and (step.prune.profile or step.prune.keep_experts or step.prune.is_staged)
            if step.prune and not given:
                if taken is None:
                    raise ValueError(
                        "prune needs a profile of the checkpoint as it is then: put a profile step before it"
                    )
                if taken.inner is None and (step.prune.criterion == "reconstruction" or step.prune.wants_curve):
                    raise ValueError(
                        "reconstruction and curves follow from inner products: say profile: {inner: 4096} before prune"
                    )
            taken = taken if step.sample else step.profile
        if not self.steps:
            raise ValueError("there are no steps; list at least one under steps")
        if self.gate is not None and not any(step.writes for step in self.steps):
            raise ValueError("gate judges what the steps made, and they make no checkpoint; remove it or add a step")
        return self

    @model_validator(mode="after")
    def _samples_are_for_healing(self) -> Recipe:
        for number, step in enumerate(self.steps):
            if step.sample is None:
                continue
            if any(before.sample and before.sample.domain == step.sample.domain for before in self.steps[:number]):
                raise ValueError(f"there are two samples of the kind {step.sample.domain}; raise the tokens of one")
            if not any(later.heal for later in self.steps[number:]):
                raise ValueError("nothing heals on what sample writes: put it before a step with heal")
        return self
