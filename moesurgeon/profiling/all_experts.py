"""All experts on a sample of tokens, reduced at once to inner products (``profiling.inner``).

Legend: n tokens at a time, m experts that are run for a token, E experts, H hidden.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.finite import NotFinite
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import Observation, Visitor, expert_outputs
from moesurgeon.engine.ranks import Array, Ranks
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.errors import OutputError, UsageError
from moesurgeon.profiling.documents import Documents
from moesurgeon.profiling.inner import InnerWriter, Shape
from moesurgeon.profiling.sample import Rows, sampled_rows
from moesurgeon.surgery.anatomy import Anatomy

LIKELIEST = 64
# Bytes that are worked on: outputs of experts in the model's dtype, of those in float64, rows that ranks exchange; less
# where batches are smaller than usual.
_OUTPUTS, _DOUBLES, _EXCHANGED = 128 << 20, 32 << 20, 32 << 20


@dataclass(frozen=True, kw_only=True)
class InnerSpec:
    """Inner products of ``tokens`` tokens, of each token's ``experts`` likeliest experts (all, if there are fewer)."""

    tokens: int
    experts: int = LIKELIEST

    def shape(self, anatomy: Anatomy, text_tokens: int) -> Shape:
        """Return the sizes for a checkpoint and so much text; UsageError for too few experts."""
        kept = min(self.experts, anatomy.experts)
        if kept < anatomy.top_k:
            raise UsageError(
                f"--inner-experts {self.experts} leaves out experts that a token was given: "
                f"raise it to at least {anatomy.top_k}"
            )
        return Shape(
            layers=anatomy.moe_layers,
            tokens=min(self.tokens, text_tokens),
            kept=kept,
            experts=anatomy.experts,
            has_bias=anatomy.family.router.selection_bias,
        )


def inner_bytes(anatomy: Anatomy, spec: InnerSpec, tokens: int) -> int:
    """Return what inner products take beside a walk with batches of ``tokens``: what they are made of, and the rows of
    a batch with what they are gathered into."""
    shape = spec.shape(anatomy, spec.tokens)
    rows = min(tokens, shape.tokens) * _width(shape) * 4
    return (_OUTPUTS + 4 * _DOUBLES) * tokens // BATCH_TOKENS + 2 * rows + 2 * min(2 * rows, _EXCHANGED)


def _width(shape: Shape) -> int:
    return sum(int(np.prod(each)) for each in shape.row.values())


class AllExperts:
    """Runs the experts on a sample of the tokens of ``batches`` (those of all processes) and keeps inner products.

    The first process writes them to ``path``; what is there of a walk that was killed stays. ``tokens``: of a batch at
    most, by which memory at work is measured.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        domains: tuple[str, ...],
        batches: Sequence[Batch],
        spec: InnerSpec,
        path: Path,
        tokens: int = BATCH_TOKENS,
    ) -> None:
        self.shape = spec.shape(anatomy, sum(batch.text_tokens for batch in batches))
        self._path = path
        self._routing = routing_of(anatomy)
        self._batches, self._domains = batches, domains
        self._rows = sampled_rows(batches, self.shape.tokens)
        self._starts = np.concatenate([[0], np.cumsum([len(rows) for rows in self._rows])])
        self._width = _width(self.shape)
        self._at_once = tokens
        self._taken = np.empty((0, self._width), np.float32)
        self._bias: Array | None = None
        self._writer: InnerWriter | None = None

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Nothing: what there is of finished layers is in the file."""
        return {}

    def open(self) -> None:
        """Make the file, of the first process; OutputError if the disk lacks the room."""
        folder = next(each for each in self._path.parents if each.exists())
        free = shutil.disk_usage(folder).free + (self._path.stat().st_size if self._path.is_file() else 0)
        if self.shape.nbytes > free:
            raise OutputError(
                f"inner products take {self.shape.nbytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB left; "
                "lower --inner or --inner-experts, or write the profile to another disk"
            )
        self._writer = InnerWriter(self._path, self.shape)
        self._writer.put_tokens(*self._whose())

    def visitor(self, number: int) -> Visitor | None:
        """Return who runs all experts on what batch ``number`` has of the sample."""
        rows = self._rows[number]

        def visit(block: MoeBlock, seen: Observation) -> None:
            self._taken = self._reduced(block, seen, rows)
            bias = selection_bias(block)
            self._bias = None if bias is None else bias.double().cpu().numpy()

        return visit

    def gather(self, layer: int, first: int, ranks: Ranks) -> None:
        """Put the rows of a round together, a few at a time, in the order of the batches."""
        together = min(ranks.size, len(self._batches) - first)
        sizes = [len(self._rows[first + place]) for place in range(together)]
        step = max(1, _EXCHANGED // (8 * self._width))
        for start in range(0, max(sizes), step):
            count = min(step, max(sizes) - start)
            mine = np.zeros((1 if ranks.number < together else 0, count, self._width))
            if len(mine):
                part = self._taken[start : start + count]
                mine[0, : len(part)] = part
            for place, rows in enumerate(ranks.gathered(mine, together)):
                if self._writer:
                    rows = rows[: max(0, sizes[place] - start)]
                    self._writer.put_rows(layer, int(self._starts[first + place]) + start, rows)

    def finish(self, layer: int) -> None:
        """Have the layer on the disk."""
        if self._writer:
            if self._bias is not None:
                self._writer.put_bias(layer, self._bias)
            self._writer.sync()

    def _whose(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        documents = Documents(self._domains, self._batches, 0)
        domains, folds = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        for number, (batch, rows) in enumerate(zip(self._batches, self._rows, strict=True)):
            windows = rows // batch.tokens.shape[1]
            domains.append(np.full(len(rows), self._domains.index(batch.domain), np.int32))
            folds.append(documents.folds(number)[windows].astype(np.int32))
        return np.concatenate(domains), np.concatenate(folds)

    def _reduced(self, block: MoeBlock, seen: Observation, rows: Rows) -> NDArray[np.float32]:
        """Return the rows [n, width] of the sampled ``rows`` of one block, computed in float64."""
        kept = self.shape.kept
        at = torch.from_numpy(rows).to(seen.inputs.device)
        likeliest = likeliest_experts(self._routing, seen.logits[at], seen.indices[at], selection_bias(block), kept)
        found = np.empty((len(rows), self._width), np.float32)
        for place, products in inner_products(block, seen.inputs[at], seen.output[at], likeliest, self._at_once):
            parts = [*products, seen.logits[at[place]].double()]
            if kept < self.shape.experts:
                parts.append(likeliest[place].double())
            found[place] = torch.cat([part.flatten(1) for part in parts], dim=1).float().cpu().numpy()
        if not np.isfinite(found).all():
            raise NotFinite(
                f"layer {block.layer}: an expert that was run on tokens of others gives no number, or one too large; "
                "try --dtype float32, or leave --inner out"
            )
        return found


def inner_products(
    block: MoeBlock,
    inputs_nH: torch.Tensor,
    output_nH: torch.Tensor,
    experts_nm: torch.Tensor,
    tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[slice, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Yield, for some rows at a time, <f_i, f_j> [r, m, m], <f_j, y> [r, m] and |y|^2 [r, 1] in float64.

    f are the outputs of ``experts_nm`` on ``inputs_nH``, y is ``output_nH``. ``tokens``: see :class:`AllExperts`.
    """
    kept, hidden = experts_nm.shape[1], inputs_nH.shape[1]
    step = max(1, _OUTPUTS * tokens // BATCH_TOKENS // (kept * hidden * inputs_nH.dtype.itemsize))
    finer = max(1, _DOUBLES * tokens // BATCH_TOKENS // (kept * hidden * 8))
    for first in range(0, len(inputs_nH), step):
        some, chosen = inputs_nH[first : first + step], experts_nm[first : first + step]
        outputs = torch.zeros(len(some), kept, hidden, dtype=some.dtype, device=some.device)
        for _expert, token, rank, output in expert_outputs(block.experts, some, chosen):
            outputs[token, rank] = output.to(outputs.dtype)
        for start in range(0, len(some), finer):
            f = outputs[start : start + finer].double()
            place = slice(first + start, first + start + len(f))
            y = output_nH[place].double()
            products = torch.bmm(f, y[:, :, None]).squeeze(-1)
            yield place, (torch.bmm(f, f.transpose(1, 2)), products, y.square().sum(-1, keepdim=True))


def likeliest_experts(
    routing: Routing, logits_TE: torch.Tensor, chosen_TK: torch.Tensor, bias_E: torch.Tensor | None, count: int
) -> torch.Tensor:
    """Return for each token the ``count`` experts that its router ranks highest [T, count], ascending.

    Those that were chosen are among them whatever rounding says; those outside the winning groups come last.
    """
    experts = logits_TE.shape[-1]
    if count >= experts:
        return torch.arange(experts, device=logits_TE.device).expand(len(logits_TE), -1)
    scores = routing.scores(logits_TE)
    ranked = routing.ranked(scores, bias_E)
    plain = scores if bias_E is None else scores + bias_E.float()
    outside = ranked == -torch.inf
    # In three steps, each ranked in itself: chosen, in a winning group, outside.
    tier = (~outside).long().scatter_(-1, chosen_TK.to(logits_TE.device), 2)
    order = plain.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, tier.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    return order[:, :count].sort(-1).values


def rule_of(anatomy: Anatomy) -> dict[str, Any]:
    """Return the router's rule as profile.json has it; ``renormalises``: of a single choice, and of several."""
    routing, rule = routing_of(anatomy), anatomy.family.router
    return {
        "top_k": anatomy.top_k,
        "scoring": routing.scoring,
        "renormalises": [rule.renormalises(anatomy.config, top_k) for top_k in (1, 2)],
        "scale": routing.scale,
        "groups": routing.groups,
        "kept_groups": routing.kept_groups,
        "group_score": routing.group_score,
        "epsilon": routing.epsilon,
    }
