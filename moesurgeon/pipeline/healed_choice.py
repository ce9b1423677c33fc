"""The criterion ``healed``: in every layer the experts with which least of the error is left after the refit.

One walk over what is about to be cut, before anything is: at each mixture layer a sample of tokens is taken, subsets
of the experts are tried on it (``healing.trials``), and the best one counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Layer, Walk
from moesurgeon.healing.bound import bare_errors, inner_of
from moesurgeon.healing.sample import Sample, take_sample
from moesurgeon.healing.trials import Left, Trials, cache_bytes
from moesurgeon.pipeline.choice import Choice
from moesurgeon.pipeline.explained import explain_choice
from moesurgeon.pipeline.prune_spec import HEALED
from moesurgeon.pipeline.weighing import weigh_support, weigh_traffic
from moesurgeon.profiling.sample import sampled_rows
from moesurgeon.profiling.statistics import Statistics
from moesurgeon.progress import SILENT, Progress
from moesurgeon.selection.choose import best
from moesurgeon.selection.costly import FEW, search_costly
from moesurgeon.selection.criteria import COUNTING, CRITERIA, scores_of
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan

if TYPE_CHECKING:  # which knows this module
    from moesurgeon.pipeline.heal import Healer

TOKENS, HELDOUT_TOKENS = 8192, 8192
"""Tokens of each layer that subsets are refitted on, and judged on."""

Subset = tuple[int, ...]
Fixed = Mapping[int, Collection[int]]
"""By layer, experts that stay in any case."""
Starts = Mapping[int, Mapping[str, Subset]]
"""By layer, what other criteria would keep."""


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What stays of a layer and leaves the errors ``left``; ``refitted`` subsets were compared, if ``exact`` all.

    ``others``: by criterion what it would keep, and leave.
    """

    layer: int
    kept: Subset
    left: Left
    refitted: int
    exact: bool
    others: Mapping[str, tuple[Subset, Left]]

    def as_dict(self) -> dict[str, Any]:
        """Return the layer's part of a report."""
        return {
            "layer": self.layer,
            "error": self.left.bare,
            "healed_error": self.left.healed,
            "refitted": self.refitted,
            "exact": self.exact,
            "criteria": {
                name: {"kept": list(kept), "error": left.bare, "healed_error": left.healed}
                for name, (kept, left) in self.others.items()
            },
        }


def starts_of(
    statistics: Statistics, count: int, groups: int = 1, fixed: Fixed | None = None
) -> dict[int, dict[str, Subset]]:
    """Return by layer what each criterion of a profile would keep; of token counts alone only frequency can say."""
    names = [name for name in CRITERIA if name != "random" and (name in COUNTING or not statistics.counts_only)]
    choices = {name: best(scores_of(statistics, name), statistics.layers, count, groups, fixed=fixed) for name in names}
    return {layer: {name: kept[layer] for name, kept in choices.items()} for layer in statistics.layers}


def settled(choice: Choice, healer: Healer, anatomy: Anatomy, plan: EditPlan | None = None) -> Choice:
    """Return ``choice``, of which the count is known, with the experts that leave least after a refit.

    Of what ``plan`` makes of the healer's checkpoint (None: of that), which is ``anatomy``.
    """
    open_ = choice.unsettled
    assert open_ is not None
    statistics, groups = open_.profile.weighted, anatomy.groups[0]

    def chosen(fixed: Fixed) -> dict[int, LayerChoice]:
        return healer.choose(plan, open_.count, starts=starts_of(statistics, open_.count, groups, fixed), fixed=fixed)

    found = chosen(open_.fixed)
    kept = {layer: each.kept for layer, each in found.items()}
    text = healer.choice_text()
    record = {**choice.record, **text, "choice_documents": healer.documents}
    evidence = {**choice.evidence, "choice": {**text, "layers": [each.as_dict() for each in found.values()]}}
    evidence |= explain_choice(anatomy, open_.profile, kept, HEALED)
    warnings = [*weigh_support(statistics, kept, evidence), *weigh_traffic(statistics, kept, evidence, HEALED)]
    if open_.claims is not None:
        free = {layer: each.kept for layer, each in chosen({}).items()}
        evidence["protection"] = open_.claims.report(kept, free)
        record["protect"] = evidence["protection"]["names"]
        warnings += open_.claims.warnings_of(kept)
    return replace(choice, kept=kept, record=record, evidence=evidence, warnings=warnings, unsettled=None)


def choose_healed(
    walk: Walk,
    stream: Stream,
    learn: Sequence[int],
    held: Sequence[int],
    count: int,
    *,
    teacher: Stream | None = None,
    tokens: int = TOKENS,
    heldout_tokens: int = HELDOUT_TOKENS,
    fixed: Fixed | None = None,
    starts: Starts | None = None,
    few: int = FEW,
    progress: Progress = SILENT,
) -> dict[int, LayerChoice]:
    """Take ``stream`` through its mixture layers and return by layer which ``count`` experts are best to keep.

    ``learn`` and ``held`` are numbers of batches of ``walk``, which must not share text: samples of ``tokens`` of the
    one refit, of ``heldout_tokens`` of the other judge. ``teacher``: what a layer should give, where that is not what
    the stream itself gives; it walks beside it. ``fixed``: by layer, experts that stay in any case. No choice of
    ``starts`` leaves less. Of routing groups each keeps as many. Up to ``few`` subsets are all refitted.
    Errors count by the size of the hidden state that they are in, as in healing.
    """
    layers = stream.anatomy.moe_layers
    rows = [
        sampled_rows([walk.batches[number] for number in numbers], size)
        for numbers, size in ((learn, tokens), (held, heldout_tokens))
    ]
    found: dict[int, LayerChoice] = {}
    with progress.task("choosing", len(layers), "layers") as advance, closing(walk.layers()) as walking:
        for layer in walking:
            if teacher is not None:
                for number in (*learn, *held):
                    layer.move(teacher, number)
            if layer.number not in layers:
                for number in (*learn, *held):
                    layer.move(stream, number)
                continue
            samples = [
                take_sample(layer, stream, teacher, numbers, mine)
                for numbers, mine in zip((learn, held), rows, strict=True)
            ]
            found[layer.number] = _best_of(
                layer,
                stream,
                samples,
                count,
                fixed=frozenset((fixed or {}).get(layer.number, ())),
                starts=(starts or {}).get(layer.number, {}),
                few=few,
            )
            advance(1)
            if layer.number == layers[-1]:
                break
    return found


def _best_of(
    layer: Layer,
    stream: Stream,
    samples: Sequence[Sample],
    count: int,
    *,
    fixed: frozenset[int],
    starts: Mapping[str, Subset],
    few: int,
) -> LayerChoice:
    block, anatomy = stream.blocks[layer.number], stream.anatomy
    train, held = samples
    routing, top_k = routing_of(anatomy), anatomy.top_k
    at_once = stream.source.scratch.tokens
    trials = Trials(block, routing, top_k, train, held, cache=cache_bytes(at_once))
    known: dict[Subset, Left] = {}

    def left(kept: Subset) -> Left:
        if kept not in known:
            known[kept] = trials(kept)
        return known[kept]

    found = search_costly(
        lambda kept: left(kept).healed,
        lambda: bare_errors(inner_of(block, routing, top_k, held, at_once=at_once), routing, top_k),
        anatomy.experts,
        count,
        groups=anatomy.groups[0],
        fixed=fixed,
        starts=list(starts.values()),
        few=few,
    )
    return LayerChoice(
        layer=layer.number,
        kept=found.kept,
        left=left(found.kept),
        refitted=found.compared,
        exact=found.exact,
        others={name: (kept, left(kept)) for name, kept in starts.items()},
    )
