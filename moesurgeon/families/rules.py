"""Which layers are mixtures, and how a router gets from logits to weights. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moesurgeon.errors import CheckpointError
from moesurgeon.families.keys import count_of, is_present, value_at


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Routing limited to the best ``topk_group`` of ``n_group`` groups of consecutive experts."""

    count_key: str
    kept_key: str
    # What transformers takes where config.json does not say.
    count_default: int = 1
    kept_default: int = 1
    # Only with this value of this config key; None: always.
    only_if: tuple[str, str] | None = None
    # The score of a group: its best expert, or the sum of its best two.
    score: Literal["max", "top2-sum"]

    @property
    def least(self) -> int:
        """The experts that a group needs, so that its score can be taken."""
        return 2 if self.score == "top2-sum" else 1


@dataclass(frozen=True, kw_only=True)
class MoeLayers:
    """Which layers are mixtures of experts; every one where no key is given.

    ``first_dense_key``: layers below its value are dense; ``last_key``: so are those above its value
    (none where it is -1). ``frequency_key``: of the others those that it divides are mixtures, with the
    remainder of ``offset_key`` (``step_key``: those whose successor's number it divides).
    ``dense_layers_key``: a list of dense layers. Where there, ``layers_key`` (a list of mixtures) and
    ``types_key`` (a list of a type per layer, "dense" among them) say it all. ``defaults``: what
    transformers takes where config.json does not say.
    """

    first_dense_key: str | None = None
    last_key: str | None = None
    frequency_key: str | None = None
    offset_key: str | None = None
    step_key: str | None = None
    dense_layers_key: str | None = None
    layers_key: str | None = None
    types_key: str | None = None
    defaults: Mapping[str, int] = field(default_factory=dict)

    def of(self, config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
        """Return the numbers of the layers that ``config`` makes mixtures, of ``layers`` in all."""
        listed, types = self._list(config, self.layers_key), self._list(config, self.types_key)
        if listed is not None:
            return tuple(layer for layer in range(layers) if layer in listed)
        if types is not None:
            return tuple(layer for layer, kind in enumerate(types[:layers]) if kind != "dense")
        first = self._count(config, self.first_dense_key, 0)
        frequency = self._count(config, self.frequency_key, 1) or 1
        offset = self._count(config, self.offset_key, 0)
        step = self._count(config, self.step_key, 1) or 1
        dense = self._list(config, self.dense_layers_key) or []
        if value_at(config, self.last_key) != -1:
            layers = min(layers, self._count(config, self.last_key, layers) + 1)
        return tuple(
            layer
            for layer in range(first, layers)
            if layer % frequency == offset and (layer + 1) % step == 0 and layer not in dense
        )

    def _count(self, config: Mapping[str, Any], key: str | None, default: int) -> int:
        return count_of(config, key, self.defaults.get(key or "", default))

    def _list(self, config: Mapping[str, Any], key: str | None) -> list[Any] | None:
        value = value_at(config, key)
        if value is not None and not isinstance(value, list):
            raise CheckpointError(f"config.json gives {key} as something that is no list; restore it")
        return value


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """From router logits to expert weights.

    ``renormalise``: whether the weights of the chosen experts are divided by their sum: always,
    never, or as the config key of that name says (``renormalise_default`` where it is absent). Where
    it is so, the weight of a top-1 choice is constant and carries no gradient.
    """

    scoring: Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"]
    renormalise: bool | str
    renormalise_default: bool = False
    # What is added to that sum.
    epsilon: float = 0.0
    # Where even a renormalising gate leaves the weight of a single choice as it is.
    single_is_raw: bool = False
    scale_key: str | None = None
    # What transformers takes where config.json does not say.
    scale_default: float = 1.0
    groups: Groups | None = None
    # Whether a per-expert bias takes part in the choice (not in the weights).
    selection_bias: bool = False

    def renormalises(self, config: Mapping[str, Any], top_k: int) -> bool:
        """Tell whether this checkpoint's gate divides the ``top_k`` chosen weights by their sum."""
        if self.single_is_raw and top_k == 1:
            return False
        if isinstance(self.renormalise, bool):
            return self.renormalise
        if not is_present(config, self.renormalise):
            return self.renormalise_default
        return bool(value_at(config, self.renormalise))

    def group_counts(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return (number of groups, groups kept); (1, 1) where routing is not grouped."""
        if self.groups is None:
            return 1, 1
        if self.groups.only_if and value_at(config, self.groups.only_if[0]) != self.groups.only_if[1]:
            return 1, 1
        count = count_of(config, self.groups.count_key, self.groups.count_default) or 1
        return count, count_of(config, self.groups.kept_key, self.groups.kept_default) or 1
