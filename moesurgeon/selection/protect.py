"""Protection: experts that some text needs, kept whatever the criterion says of them on average.

What can be protected: a domain of the profile; ``long-context``, the positions beyond the first bucket;
``first-choice``, what a top-1 gate would route; ``low-support``, experts that were given too few tokens to be judged.
An expert is protected for a text if it carries at least a share of it, or is among the best by REAP on it.

Legend: N names, L mixture layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.errors import ProfileError, UsageError
from moesurgeon.profiling.artefact import Profile
from moesurgeon.profiling.statistics import POSITIONS, Array, shares
from moesurgeon.profiling.summary import NICHE, bucket_name
from moesurgeon.profiling.uncertainty import SUPPORT, has_support

LONG_CONTEXT, FIRST_CHOICE, LOW_SUPPORT = "long-context", "first-choice", "low-support"
_NOT_DOMAINS = (LONG_CONTEXT, FIRST_CHOICE, LOW_SUPPORT)


@dataclass(frozen=True)
class Claims:
    """Who is protected by what.

    ``asked`` [N]: the share that was asked for by each of ``names``, NaN for low-support. ``share`` [N, L, E]: what
    each expert carries of that text's choices in its layer; ``held`` [N, L, E]: whether that, or REAP, protects it.
    """

    names: tuple[str, ...]
    asked: Array
    share: Array
    held: NDArray[np.bool_]
    layers: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def protected(self) -> NDArray[np.bool_]:
        """Who is protected by any name [L, E]."""
        result: NDArray[np.bool_] = np.logical_or.reduce(self.held, axis=0)
        return result

    @property
    def strength(self) -> Array:
        """The strongest claim of each expert [L, E]: how many times it carries the share that was asked for.

        0 for who has too little support: there is nothing measured to claim.
        """
        times = np.nan_to_num(self.share / self.asked[:, None, None]) * self.held
        result: Array = times.max(axis=0)
        return result

    def fixed(self, each: int, groups: int = 1) -> dict[int, tuple[int, ...]]:
        """Return who is sure to stay where every layer (and group) keeps ``each``: the strongest claims first."""
        size = self.protected.shape[1] // groups
        result = {}
        for row, layer in enumerate(self.layers):
            chosen: list[int] = []
            for group in range(groups):
                mine = group * size + np.flatnonzero(self.protected[row, group * size : (group + 1) * size])
                order = np.argsort(-self.strength[row, mine], kind="stable")
                chosen += mine[order[:each]].tolist()
            result[layer] = tuple(sorted(chosen))
        return result

    def fixed_in_all(self, total: int, least: int, groups: int = 1) -> dict[int, tuple[int, ...]]:
        """Return who is sure to stay where ``total`` go of all layers and every group keeps ``least``.

        If the others are too few to go, the weakest claims are given up, as many as it takes.
        """
        held = self.protected.copy()
        size = held.shape[1] // groups
        most = size - least
        room = int(np.minimum(size - self._by_group(held, groups), most).sum())  # of those that may go
        strength = self.strength
        weakest = sorted(zip(*np.nonzero(held), strict=True), key=lambda at: (strength[at], -at[0], -at[1]))
        for row, expert in weakest:
            if room >= total:
                break
            group = expert // size
            if size - held[row, group * size : (group + 1) * size].sum() < most:
                held[row, expert] = False
                room += 1
        return {layer: tuple(np.flatnonzero(held[row]).tolist()) for row, layer in enumerate(self.layers)}

    def report(self, kept: Mapping[int, Sequence[int]], free: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        """Return what protection changed: ``kept`` against ``free``, the choice without it."""
        experts = range(self.held.shape[2])
        layers = {}
        for row, layer in enumerate(self.layers):
            stay, would = set(kept[layer]), set(free[layer])
            layers[str(layer)] = {
                "protected": [self._claim(row, expert) for expert in experts if self.protected[row, expert]],
                "kept_instead": sorted(stay - would),
                "dropped_instead": sorted(would - stay),
                "went": [expert for expert in experts if self.protected[row, expert] and expert not in stay],
            }
        asked = [None if np.isnan(share) else float(share) for share in self.asked]
        return {"names": dict(zip(self.names, asked, strict=True)), "layers": layers}

    def warnings_of(self, kept: Mapping[int, Sequence[int]]) -> list[str]:
        """Say what protection rests on little, and who goes all the same."""
        gone = {
            layer: [int(expert) for expert in np.flatnonzero(self.protected[row]) if expert not in kept[layer]]
            for row, layer in enumerate(self.layers)
        }
        places = [f"layer {layer}: {', '.join(map(str, experts[:8]))}" for layer, experts in gone.items() if experts]
        if not places:
            return list(self.warnings)
        return [
            *self.warnings,
            f"{sum(map(len, gone.values()))} protected experts go all the same, those with the weakest claims "
            f"({'; '.join(places[:6])}{'; ...' if len(places) > 6 else ''}): more are protected than can stay; keep "
            "more, or ask for a larger share (--protect NAME=0.3)",
        ]

    def _claim(self, row: int, expert: int) -> dict[str, Any]:
        """Return by what an expert is protected, the strongest first, and its share of that text."""
        by = np.flatnonzero(self.held[:, row, expert])
        times = np.nan_to_num(self.share[by, row, expert] / self.asked[by])
        by = by[np.argsort(-times, kind="stable")]
        return {
            "expert": expert,
            "by": [self.names[number] for number in by],
            "share": float(self.share[by[0], row, expert]),
        }

    @staticmethod
    def _by_group(of: NDArray[np.bool_], groups: int) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = of.reshape(len(of), groups, -1).sum(axis=2)
        return counts


def claims_of(profile: Profile, asked: Sequence[str]) -> Claims:
    """Return who is protected by ``asked``, each ``NAME[=share]``.

    The default share is twice an even one, 2 / E: what ``profile show`` calls a niche. The best by REAP are as many
    as a token is given, of those with support in that text. Raises UsageError for a name that is none, ProfileError
    for what the profile does not hold.
    """
    statistics = profile.statistics
    names, wanted, share, held, warnings = [], [], [], [], []
    for each in asked:
        name, limit = _parsed(each, statistics.domains)
        if name in names:
            raise UsageError(f"--protect names {name} twice; give each once")
        own, enough = _claim_of(profile, name, NICHE / statistics.experts if limit is None else limit)
        if name in statistics.domains and (seen := statistics.seen[statistics.domains.index(name)]) < SUPPORT:
            warnings.append(f"--protect {name} rests on {int(seen)} tokens of text; profile more of it")
        names.append(name)
        wanted.append(np.nan if _is_low_support(name, statistics.domains) else limit or NICHE / statistics.experts)
        share.append(own)
        held.append(enough)
    return Claims(tuple(names), np.array(wanted), np.array(share), np.array(held), statistics.layers, tuple(warnings))


def check_protected(asked: Sequence[str], domains: Sequence[str], length: int) -> None:
    """Raise now what :func:`claims_of` will raise of a profile with ``domains``, in windows of ``length`` tokens."""
    names = [_parsed(each, domains)[0] for each in asked]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--protect names {name} twice; give each once")
        if name == LONG_CONTEXT and name not in domains and length <= POSITIONS[1]:
            raise UsageError(f"--protect {name} is about positions from {POSITIONS[1]} on; raise the length")


def _parsed(text: str, domains: Sequence[str]) -> tuple[str, float | None]:
    """Take ``NAME[=share]`` apart; a domain of a special name wins, and so does one with an equals sign in it."""
    name, sign, number = text.rpartition("=")
    if not sign or text in domains:
        name, sign = text, ""
    if name not in (*domains, *_NOT_DOMAINS):
        raise UsageError(
            f"--protect {text}: the profile has no domain {name!r}, only {', '.join(domains)}; "
            f"{', '.join(_NOT_DOMAINS)} can be protected as well"
        )
    if not sign:
        return name, None
    try:
        share = float(number)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise UsageError(f"--protect {text}: {number!r} is no share of {name}'s traffic from 0 to 1, such as 0.25")
    if _is_low_support(name, domains):
        raise UsageError(f"--protect {name} takes no share: it keeps who was given under {SUPPORT} tokens")
    return name, share


def _is_low_support(name: str, domains: Sequence[str]) -> bool:
    return name == LOW_SUPPORT and name not in domains


def _claim_of(profile: Profile, name: str, limit: float) -> tuple[Array, NDArray[np.bool_]]:
    """Return what each expert carries of a text [L, E], and whether that, or REAP, protects it."""
    statistics, weighted = profile.statistics, profile.weighted
    if name in statistics.domains:
        number = statistics.domains.index(name)
        # As they were counted: a domain may be protected that has little weight in the choice.
        tokens, norms = (statistics.by_domain(of)[number] for of in ("tokens", "weighted_norm"))
        return _share_of(tokens), _is_best(tokens, norms, statistics.top_k) | _carries(tokens, limit)
    if name == LOW_SUPPORT:
        return weighted.utilization(), ~has_support(weighted)
    if statistics.counts_only:
        raise ProfileError(
            f"the profile holds a server's token counts only, which say nothing of {name}; protect its domains "
            f"({', '.join(statistics.domains)}), or profile the checkpoint with moesurgeon profile"
        )
    if name == FIRST_CHOICE:
        first = weighted.total("first_choice")
        return _share_of(first), _carries(first, limit)
    tokens, norms = (weighted.by_position(of)[1:].sum(axis=0) for of in ("tokens", "weighted_norm"))
    if not tokens.any():
        raise ProfileError(
            f"the profile holds no text beyond position {bucket_name(0).partition('-')[2]}, so that --protect {name} "
            "has nothing to go by; profile with a larger --length"
        )
    return _share_of(tokens), _is_best(tokens, norms, statistics.top_k) | _carries(tokens, limit)


def _share_of(counts: Array) -> Array:
    return np.where(counts.sum(axis=-1, keepdims=True) > 0, shares(counts), 0.0)


def _carries(counts: Array, limit: float) -> NDArray[np.bool_]:
    """Tell who has a share of at least ``limit``, whatever rounding makes of it."""
    enough: NDArray[np.bool_] = _share_of(counts) >= limit * (1 - 1e-12)
    return enough


def _is_best(tokens: Array, norms: Array, count: int) -> NDArray[np.bool_]:
    """Tell who is among the ``count`` best by REAP, of those with support; nobody is where nothing was measured."""
    means = np.divide(norms, tokens, out=np.zeros_like(norms), where=tokens > 0)
    means[tokens < SUPPORT] = 0.0
    best = np.zeros(means.shape, dtype=bool)
    np.put_along_axis(best, np.argsort(-means, axis=1, kind="stable")[:, :count], True, axis=1)
    result: NDArray[np.bool_] = best & (means > 0)
    return result
