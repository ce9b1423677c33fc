"""One pass over the traces that fills the statistics of a profile.

On the first batch of every layer the recorded routing is held against the block twice: replayed
through the stock experts it must reproduce the block's output, and it must be what the family's rule
makes of the recorded logits. A profile that records anything else is worse than none.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from moesurgeon.engine.batches import Batch, batches_of, rows_for
from moesurgeon.engine.model import MoeBlock, logits_of, moe_blocks
from moesurgeon.engine.observe import Observation, observed, replays
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from moesurgeon.errors import CheckpointError, OutputError
from moesurgeon.profiling.statistics import PEAK, Statistics
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.traces.windows import Corpus


def take_profile(
    model: PreTrainedModel, anatomy: Anatomy, corpus: Corpus, *, length: int, progress: Progress = SILENT
) -> Statistics:
    """Run ``model`` over ``corpus`` and return its routing statistics.

    Raises OutputError if the routing recorded is not the routing that the model used.
    """
    blocks = moe_blocks(model, anatomy)
    collector = _Collector(anatomy, corpus.domains, {block.layer: block.experts.forward for block in blocks})
    total = sum(corpus.tokens.values())
    with observed(blocks, collector.visit), progress.task("profiling", total, "tokens") as advance:
        for batch in batches_of(corpus, rows=rows_for(length), device=model.device):
            collector.begin(batch)
            logits_of(model, batch.tokens, batch.mask)
            advance(batch.text_tokens)
    if not all(np.isfinite(sums).all() for sums in collector.statistics.sums.values()):
        raise CheckpointError(
            "expert outputs or router logits are not numbers: the weights hold NaN or infinities, or overflow in this "
            "--dtype; try float32"
        )
    return collector.statistics


class _Collector:
    """Adds up observations; knows which rows of the batch at hand are text."""

    def __init__(self, anatomy: Anatomy, domains: tuple[str, ...], stock: dict[int, object]) -> None:
        self.statistics = Statistics.empty(domains, anatomy.moe_layers, anatomy.experts, anatomy.top_k)
        self._title = anatomy.family.title
        self._routing = routing_of(anatomy)
        self._stock = stock
        self._checked: set[int] = set()
        self._domain = 0
        self._rows = torch.empty(0)

    def begin(self, batch: Batch) -> None:
        """Announce the batch that the model is given next."""
        self._domain = self.statistics.domains.index(batch.domain)
        self._rows = batch.is_text.flatten().nonzero().squeeze(-1)
        self.statistics.seen[self._domain] += batch.text_tokens

    def visit(self, block: MoeBlock, seen: Observation) -> None:
        """Add one block's observation to the sums."""
        if block.layer not in self._checked:
            self._check(block, seen)
            self._checked.add(block.layer)
        logits, indices = seen.logits[self._rows], seen.indices[self._rows]
        weights, norms = seen.weights[self._rows].double(), seen.norms[self._rows].double()
        scores = self._routing.scores(logits)
        first = self._routing.choose(scores, selection_bias(block), 1).squeeze(-1)
        place = (self._domain, self.statistics.layers.index(block.layer))
        pull = weights * norms
        for name, values in (
            ("tokens", torch.ones_like(weights)),
            ("weight", weights),
            ("norm", norms),
            ("norm2", norms.square()),
            ("weighted_norm", pull),
            ("weighted_norm2", pull.square()),
        ):
            self.statistics.sums[name][place] += self._per_expert(indices.flatten(), values.flatten())
        self.statistics.sums["first_choice"][place] += self._per_expert(first, torch.ones_like(weights[:, 0]))
        peak = torch.zeros(self.statistics.experts, dtype=torch.float64, device=pull.device)
        peak.scatter_reduce_(0, indices.flatten(), pull.flatten(), "amax")
        np.maximum(self.statistics.sums[PEAK][place], peak.cpu().numpy(), out=self.statistics.sums[PEAK][place])
        shares = scores / scores.sum(-1, keepdim=True)
        self.statistics.sums["entropy"][place] += float(torch.special.entr(shares.double()).sum())
        best = scores.topk(min(2, scores.shape[-1]), dim=-1).values.double()
        self.statistics.sums["margin"][place] += float((best[:, 0] - best[:, -1]).sum())

    def _per_expert(self, experts: torch.Tensor, values: torch.Tensor) -> np.ndarray:
        sums = torch.zeros(self.statistics.experts, dtype=torch.float64, device=values.device)
        return sums.index_add_(0, experts, values).cpu().numpy()

    def _check(self, block: MoeBlock, seen: Observation) -> None:
        if not seen.output.isfinite().all():
            raise CheckpointError(
                f"layer {block.layer}: the experts' output is not finite: the weights hold NaN or infinities, "
                "or overflow in this --dtype; try float32"
            )
        if not replays(block, seen, self._stock[block.layer]):  # type: ignore[arg-type]
            raise OutputError(
                f"layer {block.layer}: replaying the recorded routing does not reproduce the block's output; "
                f"moesurgeon's picture of {self._title}'s experts is wrong here, please report it"
            )
        if not follows_rule(self._routing, block, seen):
            raise OutputError(
                f"layer {block.layer}: the weights are not what the {self._title} rule makes of the router's logits "
                f"({self._routing}); please report it"
            )


def follows_rule(routing: Routing, block: MoeBlock, seen: Observation) -> bool:
    """Tell whether the recorded choice and weights are what the family's rule gives, to rounding.

    The choice is compared by what the chosen experts rank at, so that a tie may fall either way: a
    softmax in bfloat16 (DeepSeek v1) makes ties of what differs in float32. Only relative
    differences count: raw weights of 64 experts are smaller than any absolute tolerance.
    """
    scores = routing.scores(seen.logits)
    ranked = routing.ranked(scores, selection_bias(block))
    best = ranked.topk(seen.indices.shape[-1], dim=-1).values
    chosen = ranked.gather(-1, seen.indices).sort(-1, descending=True).values
    weights = routing.weights(scores, seen.indices)
    tolerance = 1e-4 if seen.logits.dtype == torch.float32 else 2e-2
    return all(
        torch.allclose(recorded.float(), expected, rtol=tolerance, atol=1e-6)
        for recorded, expected in ((chosen, best), (seen.weights, weights))
    )
