"""What a family file says: names, config keys and the router's rule. Data only.

Placeholders in tensor names: ``{layer}``, ``{expert}`` (numbers from 0) and, in a layout, ``{block}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from moesurgeon.errors import CheckpointError

# Layers and experts have at most six digits in the patterns below; no model comes near, and a count
# from an untrusted config must not become a loop without end.
MAX_COUNT = 1_000_000


def count_of(config: Mapping[str, Any], key: str | None, default: int) -> int:
    """Return the number under ``key``, or ``default`` where it is absent or null.

    Raises CheckpointError for anything that is no number from 0 to ``MAX_COUNT``.
    """
    value = config.get(key) if key else None
    if value is None:
        return default
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise CheckpointError(f"config.json gives {key} = {str(value)[:40]!r}, which is no usable number; restore it")
    return value


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

    ``first_dense_key``: layers below its value are dense. ``frequency_key``: of the others those that
    it divides are mixtures (``step_key``: those whose successor's number it divides).
    ``dense_layers_key``: a list of dense layers.
    """

    first_dense_key: str | None = None
    frequency_key: str | None = None
    step_key: str | None = None
    dense_layers_key: str | None = None

    def of(self, config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
        """Return the numbers of the layers that ``config`` makes mixtures, of ``layers`` in all."""
        first = count_of(config, self.first_dense_key, 0)
        frequency = count_of(config, self.frequency_key, 1) or 1
        step = count_of(config, self.step_key, 1) or 1
        dense = config.get(self.dense_layers_key or "") or []
        if not isinstance(dense, list):
            raise CheckpointError(f"config.json gives {self.dense_layers_key} as something that is no list; restore it")
        return tuple(
            layer
            for layer in range(first, layers)
            if layer % frequency == 0 and (layer + 1) % step == 0 and layer not in dense
        )


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """From router logits to expert weights.

    ``renormalise``: whether the weights of the chosen experts are divided by their sum: always,
    never, or as the config key of that name says (``renormalise_default`` where it is absent). Where
    it is so, the weight of a top-1 choice is constant and carries no gradient.
    """

    scoring: Literal["softmax", "sigmoid"]
    renormalise: bool | str
    renormalise_default: bool = False
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
        return bool(config.get(self.renormalise, self.renormalise_default))

    def group_counts(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return (number of groups, groups kept); (1, 1) where routing is not grouped."""
        if self.groups is None:
            return 1, 1
        if self.groups.only_if and config.get(self.groups.only_if[0]) != self.groups.only_if[1]:
            return 1, 1
        count = count_of(config, self.groups.count_key, self.groups.count_default) or 1
        return count, count_of(config, self.groups.kept_key, self.groups.kept_default) or 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one way of storing the family names its tensors.

    ``block``: the MoE block of a layer. ``expert`` (per-expert layouts): the prefix of one expert's
    tensors, followed by a name of ``projections`` and a suffix such as ``.weight`` or
    ``.weight_scale_inv``. ``fused``: patterns of tensors with all experts along axis 0; suffixes such
    as ``_blocks`` and ``_scales`` may follow. ``per_expert_rows``: other tensors with one row per
    expert (router weight, biases) and the axis that counts experts.
    """

    name: Literal["per-expert", "fused"]
    block: str
    per_expert_rows: Mapping[str, int]
    expert: str | None = None
    # Role -> name on disk; roles are gate, up, down (and gate_up where fused).
    projections: Mapping[str, str]
    shared: str | None = None

    @cached_property
    def expert_pattern(self) -> re.Pattern[str]:
        """Matches tensors that belong to one expert: groups layer, expert, projection, suffix."""
        if self.expert is None:
            return re.compile(r"(?!)")
        prefix = _pattern(self.expert.replace("{block}", self.block))
        names = "|".join(map(re.escape, self.projections.values()))
        return re.compile(rf"{prefix}(?P<projection>{names})(?P<suffix>\..+)")

    @cached_property
    def fused_pattern(self) -> re.Pattern[str]:
        """Matches tensors that hold all experts along axis 0: groups layer, projection, suffix."""
        if self.expert is not None:
            return re.compile(r"(?!)")
        names = "|".join(map(re.escape, self.projections.values()))
        return re.compile(rf"{_pattern(self.block)}\.experts\.(?P<projection>{names})(?P<suffix>([._].+)?)")

    @cached_property
    def row_patterns(self) -> tuple[tuple[re.Pattern[str], int], ...]:
        """Match the other tensors with one entry per expert; with each the axis of the experts."""
        return tuple(
            (re.compile(_pattern(name.replace("{block}", self.block))), axis)
            for name, axis in self.per_expert_rows.items()
        )

    @cached_property
    def anything_of_experts(self) -> re.Pattern[str]:
        """Matches every tensor under the experts' prefix, known or not."""
        return re.compile(rf"{_pattern(self.block)}\.experts\..+")

    @cached_property
    def shared_pattern(self) -> re.Pattern[str]:
        if self.shared is None:
            return re.compile(r"(?!)")
        return re.compile(rf"{_pattern(self.shared.replace('{block}', self.block))}.+")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model architecture with a mixture of experts.

    Keys are tuples of aliases: all that are present are edited, the first present one is read.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    layers_key: str = "num_hidden_layers"
    experts_keys: tuple[str, ...]
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    shared_key: str | None = None
    hidden_key: str = "hidden_size"
    expert_width_key: str
    moe_layers: MoeLayers = MoeLayers()
    # Extra layers behind the last one, for multi-token prediction.
    mtp_key: str | None = None
    layer: str = "model.layers.{layer}"
    attention: str = "model.layers.{layer}.self_attn."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    router: RouterRule
    layouts: tuple[Layout, ...]
    # Where the running model keeps its parts (transformers 5): block, router and experts in it.
    block_module: str = "model.layers.{layer}.mlp"
    router_module: str = "gate"
    experts_module: str = "experts"

    @cached_property
    def layer_pattern(self) -> re.Pattern[str]:
        """Matches any tensor of a layer; group ``layer``."""
        return re.compile(rf"{_pattern(self.layer)}\..+")


def _pattern(template: str) -> str:
    """Turn a name with placeholders into a regular expression."""
    pattern = re.escape(template)
    for placeholder in ("layer", "expert"):
        pattern = pattern.replace(re.escape("{" + placeholder + "}"), rf"(?P<{placeholder}>0|[1-9]\d{{0,5}})")
    return pattern
