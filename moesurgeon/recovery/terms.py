"""The terms of one step: what the objective asks for, and what keeps routers in shape beside it.

A batch goes through in pieces, of which each adds its share, so that they add up to the whole's; one piece may be all.
Means over tokens are weighted by the tokens of a piece. Balance is a product of two means, hidden states count by the
teacher's size: the factor that has no gradient is added up over all pieces, of all processes, in the forward pass.

Legend: B windows, T tokens of a window, N tokens of text in a piece, H hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch

from moesurgeon.engine.batches import Batch, to_batch
from moesurgeon.engine.routing import Routing
from moesurgeon.recovery.estimator import Routed
from moesurgeon.recovery.objective import Losses, balance_of, language_loss, router_distillation, z_loss
from moesurgeon.recovery.share import Share
from moesurgeon.recovery.teacher import Said

Name = TypeVar("Name", int, str)


def pieces_of(batch: Batch, tokens: int | None) -> list[Batch]:
    """Divide ``batch`` into pieces of up to ``tokens``, of one window at least (None: it stays whole)."""
    rows = len(batch.windows) if tokens is None else max(1, tokens // batch.tokens.shape[1])
    if rows >= len(batch.windows):
        return [batch]
    windows = batch.windows
    return [to_batch(windows[start : start + rows], batch.tokens.device) for start in range(0, len(windows), rows)]


@dataclass
class Terms:
    """What the terms of one step need to know of all its ``pieces``, and what they came to.

    ``share``: which the pieces are of; what the other processes have is added up where it is needed. ``choices`` [E] by
    mixture layer, ``sizes`` (of the teacher's hidden states, squared) and ``away`` (the student's distance from them)
    by layer are added up in the forward pass. ``figures``: of each term before its coefficient.
    """

    losses: Losses
    rule: Routing
    pieces: Sequence[Batch]
    share: Share
    choices: dict[int, torch.Tensor] = field(default_factory=dict)
    sizes: dict[int, torch.Tensor] = field(default_factory=dict)
    away: dict[int, torch.Tensor] = field(default_factory=dict)
    figures: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tokens = sum(int(piece.is_text.sum()) for piece in self.pieces)
        self._predicted = sum(int(piece.is_text[:, 1:].sum()) for piece in self.pieces)

    def count(self, layer: int, number: int, routed: Routed) -> None:
        """Add what was chosen of a piece."""
        chosen = routed.chosen[self.pieces[number].is_text.flatten()].flatten()
        _add(self.choices, layer, chosen.bincount(minlength=routed.logits.shape[-1]))

    @torch.no_grad()
    def see_hidden(self, layer: int, number: int, states_BTH: torch.Tensor, wanted_NH: torch.Tensor) -> None:
        """Take down what came out of a layer of a piece, beside what the teacher has there."""
        _add(self.sizes, layer, wanted_NH.float().square().sum())
        _add(self.away, layer, self._away(number, states_BTH, wanted_NH))

    def at_the_end(self, number: int, logits_BTV: torch.Tensor, said: Said) -> torch.Tensor:
        """Return what a piece's logits add to the objective."""
        piece, losses = self.pieces[number], self.losses
        terms = []
        if losses.objective == "distill":
            kl = self._part(number) * said.divergence(logits_BTV, piece.is_text, losses.temperature)
            _add(self.figures, "kl", kl)
            terms.append(kl)
        if factor := losses.lm if losses.objective == "distill" else 1.0:
            loss = 0.0 * logits_BTV.sum()
            if predicted := int(piece.is_text[:, 1:].sum()):  # of one token a window there is no mean
                part = predicted / self._predicted * self.share.predicted
                loss = part * language_loss(logits_BTV, piece.tokens, piece.is_text)
            _add(self.figures, "lm", loss)
            terms.append(factor * loss)
        return torch.stack(terms).sum()

    def of_routers(
        self, layer: int, number: int, routed: Routed, teacher_NE: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return what a layer's router adds to the objective, and to what is beside it, on a piece."""
        piece, losses = self.pieces[number], self.losses
        share = self._part(number) / len(self.choices)
        main = None
        if teacher_NE is not None:
            distilled = share * router_distillation(self.rule, routed, teacher_NE, piece.is_text)
            _add(self.figures, "router", distilled)
            main = losses.router * distilled
        choices_E = self._all_choices[layer]
        logits_NE = routed.logits[piece.is_text.flatten()]
        balance = share * balance_of(self.rule, logits_NE, choices_E / choices_E.sum())
        _add(self.figures, "balance", balance)
        beside = losses.balance * balance
        if losses.z:
            size = share * z_loss(routed, piece.is_text)
            _add(self.figures, "z", size)
            beside = beside + losses.z * size
        return main, beside

    def of_hidden(self, layer: int, number: int, states_BTH: torch.Tensor, wanted_NH: torch.Tensor) -> torch.Tensor:
        """Return what a layer's output adds to the objective on a piece."""
        away = self._away(number, states_BTH, wanted_NH)
        return self._counts * self.losses.hidden * away / self._all_sizes[layer] / len(self.sizes)

    def complete(self) -> Mapping[str, float]:
        """Return all figures, of all processes, the objective's first; complete when all pieces have been through."""
        losses, found = self.losses, dict(self.figures)
        if self.sizes:
            each = [away / self._all_sizes[layer] for layer, away in self.away.items()]
            found["hidden"] = self._counts * torch.stack(each).mean()
        factors = {"kl": 1.0, "lm": losses.lm if losses.objective == "distill" else 1.0, "router": losses.router}
        factors["hidden"] = losses.hidden
        loss = torch.stack([factor * found[name] for name, factor in factors.items() if name in found]).sum()
        mine = {"loss": loss, **{name: found[name] for name in (*factors, "balance", "z") if name in found}}
        sums = self.share.summed(torch.stack([each.float() for each in mine.values()])).tolist()
        return dict(zip(mine, sums, strict=True))

    @cached_property
    def _all_choices(self) -> dict[int, torch.Tensor]:
        return self._of_all(self.choices)

    @cached_property
    def _all_sizes(self) -> dict[int, torch.Tensor]:
        return self._of_all(self.sizes)

    def _of_all(self, mine: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the sums over all processes, in one exchange."""
        return dict(zip(mine, self.share.summed(torch.stack(list(mine.values()))), strict=True))

    def _away(self, number: int, states_BTH: torch.Tensor, wanted_NH: torch.Tensor) -> torch.Tensor:
        return (states_BTH[self.pieces[number].is_text].float() - wanted_NH.float()).square().sum()

    @property
    def _counts(self) -> float:
        """Whether these rows are there for more than to be there."""
        return float(self.share.text > 0)

    def _part(self, number: int) -> float:
        """Return the share of a piece in all tokens of the batch."""
        return int(self.pieces[number].is_text.sum()) / self._tokens * self.share.text


def _add(sums: dict[Name, torch.Tensor], name: Name, value: torch.Tensor) -> None:
    value = value.detach()
    sums[name] = sums[name] + value if name in sums else value


@dataclass(frozen=True)
class Heard:
    """What the student made of a whole batch: ``logits`` [B, T, V], ``routed`` by mixture layer, ``hidden`` [B, T, H]
    by layer where it is asked for."""

    logits: torch.Tensor
    routed: Sequence[Routed]
    hidden: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Sums:
    """``main``: the objective; ``beside``: what is added to it, and must not hide that the objective has no gradient;
    ``figures``: each of their terms before its coefficient, of all processes."""

    main: torch.Tensor
    beside: torch.Tensor
    figures: Mapping[str, float]


def sums_of(losses: Losses, rule: Routing, student: Heard, said: Said, share: Share, *, routers: bool) -> Sums:
    """Return what this process's ``share`` of a batch, as one piece, adds up to; ``routers``: whether they are trained.

    Balance and z are for routers that change: experts alone must not pay for what they cannot help.
    """
    terms = Terms(losses, rule, [share.batch], share)
    for layer, routed in enumerate(student.routed):
        terms.count(layer, 0, routed)
    pairs = list(zip(student.hidden, said.hidden, strict=True)) if losses.hidden else []
    for layer, (mine, wanted) in enumerate(pairs):
        terms.see_hidden(layer, 0, mine, wanted)
    main, beside = [terms.at_the_end(0, student.logits, said)], []
    for layer, routed in enumerate(student.routed):
        more, rest = terms.of_routers(layer, 0, routed, said.routers[layer] if losses.router else None)
        main += [] if more is None else [more]
        beside.append(rest)
    main += [terms.of_hidden(layer, 0, mine, wanted) for layer, (mine, wanted) in enumerate(pairs)]
    beside_all = torch.stack(beside).sum()
    return Sums(torch.stack(main).sum(), beside_all if routers else torch.zeros_like(beside_all), terms.complete())
