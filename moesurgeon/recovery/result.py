"""What a recovery is asked to do, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moesurgeon.recovery.folder import Adapter
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.targets import Adapt, Kind, parts_of
from moesurgeon.surgery.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is to be done. ``adapt``: what is trained, routers through an ``adapter`` of this kind; ``changed``: of
    experts only those whose traffic differs from the teacher's by more than this share of it; ``experts``: by layer
    the teacher's numbers of the student's experts, None where they are not known."""

    adapt: tuple[Adapt, ...] = ("routers",)
    adapter: Kind = "lora"
    losses: Losses = field(default_factory=Losses)
    schedule: Schedule = field(default_factory=Schedule)
    changed: float | None = None
    experts: Mapping[int, Sequence[int]] | None = None
    length: int = 512

    def candidates(self, anatomy: Anatomy) -> int | None:
        """Return how many experts of a token get a gradient; None: all.

        The plain language-model loss is run on the gate as it is, and so are experts alone; distillation through the
        estimator.
        """
        is_plain = self.losses.objective == "lm" or "routers" not in parts_of(self.adapt)
        return anatomy.top_k if is_plain else self.schedule.candidates


@dataclass
class Recovered:
    """``tensors``: the best weights by running name, as they will be stored; None if nothing beat the start.

    ``gradient_norm``: at the routers (at the experts, if no router is trained) of the objective alone, without the
    balancing and z losses, at the first step. ``parts``: the loss with only one part of what was trained.
    ``ranks`` (of AdaLoRA): by layer, ``last`` as they were dealt out in the end, ``written`` those of the best state.
    ``adapter``: the best state for peft's own use, if there is one and all of it is adapters.
    """

    tensors: dict[str, torch.Tensor] | None
    closed: dict[str, Any]
    gradient_norm: float
    trained: int
    steps: int = 0
    parts: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[str, Any] | None = None
    adapter: Adapter | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report: figures of all text, then by domain, part and layer."""
        figures = dict(self.closed)
        return {
            **{name: figures[name] for name in ("loss_before", "loss_after", "teacher_loss", "gap_closed", "interval")},
            "domains_closed": figures["domains"],
            "parts": self.parts,
            "gradient_norm": self.gradient_norm,
            "trained_parameters": self.trained,
            "steps": self.steps,
            "ranks": self.ranks,
            "usage": self.usage,
            "log": self.log,
        }
