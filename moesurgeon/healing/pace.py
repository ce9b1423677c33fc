"""How layers are healed, as options say it; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Gt, Lt

Method = Literal["none", "scale", "ridge", "distill"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Length and pace of the training of each layer, and what it may change.

    ``patience``: judgements without a better state after which it ends. ``router``: let the routers change as well:
    fit after the refit, and trained along in the distillation. ``rank``: refit in the span of so many leading
    directions of each expert's activations (None: in all), for experts whose normal equations are too large.
    """

    steps: Annotated[int, Ge(1)] = 600
    tokens_per_step: Annotated[int, Ge(8)] = 2048
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    judge_every: Annotated[int, Ge(1)] = 50
    patience: Annotated[int, Ge(1)] = 4
    router: bool = False
    rank: Annotated[int, Ge(1)] | None = None
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
