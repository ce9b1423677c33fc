"""The terms of a step whose batch goes through in pieces: each piece's share, so that they add up to the whole's.

Means over tokens are weighted by the tokens of a piece. The balancing loss is a product of two means: that of the
choices, which has no gradient, is counted over all pieces in the forward pass. Legend as in ``objective``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moesurgeon.engine.batches import Batch, to_batch
from moesurgeon.engine.routing import Routing
from moesurgeon.recovery.estimator import Routed
from moesurgeon.recovery.objective import Losses, balance_of, language_loss, router_distillation, z_loss
from moesurgeon.recovery.share import Share
from moesurgeon.recovery.teacher import Said


def pieces_of(batch: Batch, tokens: int | None) -> list[Batch]:
    """Divide ``batch`` into pieces of up to ``tokens``, of one window at least (None: it stays whole)."""
    rows = len(batch.windows) if tokens is None else max(1, tokens // batch.tokens.shape[1])
    if rows >= len(batch.windows):
        return [batch]
    windows = batch.windows
    return [to_batch(windows[start : start + rows], batch.tokens.device) for start in range(0, len(windows), rows)]


@dataclass
class Terms:
    """What the terms of one step need to know of all its ``pieces``; ``layers``: the mixture layers' numbers.

    ``share``: which the pieces are of; what the other processes have is added up where it is needed. ``choices`` [E] by
    mixture layer and ``sizes`` (of the teacher's hidden states, squared) by layer are added up in the forward pass.
    ``figures``: of each term before its coefficient, complete when all have been through.
    """

    losses: Losses
    rule: Routing
    layers: Sequence[int]
    pieces: Sequence[Batch]
    share: Share
    choices: dict[int, torch.Tensor] = field(default_factory=dict)
    sizes: dict[int, torch.Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tokens = sum(int(piece.is_text.sum()) for piece in self.pieces)
        self._predicted = sum(int(piece.is_text[:, 1:].sum()) for piece in self.pieces)
        self._shares: dict[int, torch.Tensor] = {}

    def count(self, layer: int, number: int, routed: Routed) -> None:
        """Add what was chosen of a piece."""
        chosen = routed.chosen[self.pieces[number].is_text.flatten()].flatten()
        counts = chosen.bincount(minlength=routed.logits.shape[-1])
        self.choices[layer] = self.choices[layer] + counts if layer in self.choices else counts

    def see_hidden(self, layer: int, layers: int, states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take down the matching of all pieces' hidden states of text [N, H], the student's and the teacher's."""
        self.sizes[layer] = self.share.summed(torch.stack([w.float().square().sum() for _, w in states]).sum())
        away = sum(float((mine.float() - wanted.float()).square().sum()) for mine, wanted in states)
        self._add("hidden", self._counts * away / float(self.sizes[layer]) / layers)

    def at_the_end(self, number: int, logits_BTV: torch.Tensor, said: Said) -> torch.Tensor:
        """Return what a piece's logits add to the objective."""
        piece, losses = self.pieces[number], self.losses
        share = self._part(number)
        terms = []
        if losses.objective == "distill":
            kl = share * said.divergence(logits_BTV, piece.is_text, losses.temperature)
            self._add("kl", kl.item())
            terms.append(kl)
        if factor := losses.lm if losses.objective == "distill" else 1.0:
            loss = 0.0 * logits_BTV.sum()
            if predicted := int(piece.is_text[:, 1:].sum()):  # of one token a window there is no mean
                part = predicted / self._predicted * self.share.predicted
                loss = part * language_loss(logits_BTV, piece.tokens, piece.is_text)
            self._add("lm", loss.item())
            terms.append(factor * loss)
        return torch.stack(terms).sum()

    def of_routers(
        self, layer: int, number: int, routed: Routed, teacher_NE: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return what a layer's router adds to the objective, and to what is beside it, on a piece."""
        piece, losses = self.pieces[number], self.losses
        share = self._part(number) / len(self.layers)
        main = None
        if teacher_NE is not None:
            distilled = share * router_distillation(self.rule, [routed], [teacher_NE], piece.is_text)
            self._add("router", distilled.item())
            main = losses.router * distilled
        logits = routed.logits[piece.is_text.flatten()]
        if layer not in self._shares:
            choices = self.share.summed(self.choices[layer])
            self._shares[layer] = choices / choices.sum()
        balance = share * balance_of(self.rule, logits, self._shares[layer])
        self._add("balance", balance.item())
        beside = losses.balance * balance
        if losses.z:
            size = share * z_loss([routed], piece.is_text)
            self._add("z", size.item())
            beside = beside + losses.z * size
        return main, beside

    def of_hidden(
        self, layer: int, layers: int, number: int, states_BTH: torch.Tensor, wanted_NH: torch.Tensor
    ) -> torch.Tensor:
        """Return what a layer's output adds to the objective on a piece."""
        away = (states_BTH[self.pieces[number].is_text].float() - wanted_NH.float()).square().sum()
        return self._counts * self.losses.hidden * away / self.sizes[layer] / layers

    def complete(self) -> Mapping[str, float]:
        """Return all figures, the objective's among them, in the order in which a whole batch has them."""
        losses, found = self.losses, self.figures
        factors = {"kl": 1.0, "lm": losses.lm if losses.objective == "distill" else 1.0, "router": losses.router}
        factors["hidden"] = losses.hidden
        loss = sum(factor * found[name] for name, factor in factors.items() if name in found)
        order = (*factors, "balance", "z")
        mine = {"loss": loss, **{name: found[name] for name in order if name in found}}
        sums = self.share.summed(torch.tensor(list(mine.values()), dtype=torch.float64, device=self._device))
        return dict(zip(mine, sums.tolist(), strict=True))

    @property
    def _counts(self) -> float:
        """Whether these rows are there for more than to be there."""
        return float(self.share.text > 0)

    @property
    def _device(self) -> torch.device:
        return self.pieces[0].tokens.device

    def _part(self, number: int) -> float:
        """Return the share of a piece in all tokens of the batch."""
        return int(self.pieces[number].is_text.sum()) / self._tokens * self.share.text

    def _add(self, name: str, value: float) -> None:
        self.figures[name] = self.figures.get(name, 0.0) + value
