"""The options that several operations share; commands and recipes fill the same objects."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from moesurgeon.healing.pace import Method, Pace
from moesurgeon.traces.documents import Split


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Where and how a checkpoint is written.

    ``layout``: store it another way (None: as the source). ``link``: hard links for shards that do not
    change. ``shard_size``: bytes of a shard at most (None: as the source is divided). ``dry_run``: only
    report the plan. ``allow_noop``: write a copy where nothing changes. ``vllm_config``: also write the class for its
    config that vLLM needs.
    """

    output: Path
    layout: str | None = None
    link: bool = False
    shard_size: int | None = None
    overwrite: bool = False
    dry_run: bool = False
    allow_noop: bool = False
    vllm_config: bool = False


@dataclass(frozen=True, kw_only=True)
class Text:
    """What the model is run on.

    ``split`` None: the operation's own split of builtin traces, all of a user's. ``max_tokens`` is for
    all traces without one of the ``budgets`` together. ``length`` None: up to 512 tokens, or the checkpoint's
    context if shorter. ``weights``: what a token of a domain counts when experts are chosen by a profile of this
    text. ``sample``: read a uniform sample of all documents by this seed rather than the first ones.
    """

    traces: tuple[str, ...] = ("builtin:all",)
    split: Split | None = None
    max_tokens: int | None = 65536
    length: int | None = None
    budgets: dict[str, int | str] = field(default_factory=dict)
    weights: dict[str, float | str] = field(default_factory=dict)
    sample: int | None = None

    def even(self, *, max_tokens: int | None, split: Split | None) -> Text:
        """Return the same text for a measurement: ``max_tokens`` of ``split``, divided evenly, all of one weight."""
        return replace(self, max_tokens=max_tokens, split=split, budgets={}, weights={})


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where and in which precision the model runs; "auto" is explained in ``engine.device``.

    ``max_memory``: bytes that may be used (None: most of what is free); what does not fit is read a layer at
    a time.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """``tokens`` in all and ``length`` of one text, at most; ``rows`` texts are drawn together.

    ``uniform``: tokens are drawn from the vocabulary, each as likely as any other, and no model is needed.
    """

    tokens: Annotated[int, Ge(8)] = 32768
    length: Annotated[int, Ge(8)] = 256
    rows: Annotated[int, Ge(1)] = 32
    temperature: Annotated[float, Ge(0.01)] = 1.0
    uniform: bool = False
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0

    @property
    def domain(self) -> str:
        """What the text is called where it is one of several."""
        return "uniform" if self.uniform else "own"


@dataclass(frozen=True, kw_only=True)
class HealSpec:
    """What heals a cut: the text, how much of it, and by which ``method`` ("none": only measure the damage).

    ``traces`` are read in their calibration split (a user's own in the train split, the largest) unless ``split``
    names one; ``heldout_tokens`` of their validation split judge every step and the whole. ``validation``: traces
    that judge instead; then a user's own are all read whole. In a recipe, traces and
    ``length`` are the recipe's where none are given. ``teacher``: the checkpoint to come back to (None: the one
    that is cut; in a recipe the first). ``sample``: heal on a uniform sample of all documents by this seed rather
    than on the first ones; the text that judges stays the same. ``budgets``: tokens of a domain to heal on, by its
    name; ``max_tokens`` is for the others. ``merge``: for pruned experts, see ``healing.merge``;
    judged layer by layer and as a whole against healing without.
    """

    traces: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    method: Method = "distill"
    teacher: str | None = None
    max_tokens: Annotated[int, Ge(8)] = 98304
    heldout_tokens: Annotated[int, Ge(8)] = 16384
    length: int | None = None
    split: Literal["train", "calibration"] | None = None
    sample: Annotated[int, Ge(0), Lt(2**63)] | None = None
    budgets: dict[str, int | str] = field(default_factory=dict)
    merge: bool = False
    pace: Pace = field(default_factory=Pace)

    @property
    def text(self) -> Text:
        """What is healed on."""
        return Text(
            traces=self.traces,
            split=self.split,
            max_tokens=self.max_tokens,
            length=self.length,
            budgets=self.budgets,
            sample=self.sample,
        )

    @property
    def judging(self) -> Text:
        """What judges every step and the whole: of all domains alike, and of no sample."""
        if self.validation:
            return Text(traces=self.validation, max_tokens=self.heldout_tokens, length=self.length)
        return replace(self.text.even(max_tokens=self.heldout_tokens, split="validation"), sample=None)
