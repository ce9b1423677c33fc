"""What a family file says: names, config keys and the router's rule. Data only.

Placeholders in tensor names: ``{layer}``, ``{expert}`` (numbers from 0) and, in a layout, ``{block}``.
Config keys may be dotted: ``ffn_config.moe_top_k`` is a key of a nested object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from moesurgeon.families.companions import ROUTER_ROWS, ROUTER_SCALES, SELECTION_BIASES
from moesurgeon.families.parts import Parts, SizeDefaults
from moesurgeon.families.rules import MoeLayers, RouterRule


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one way of storing the family names its tensors.

    ``block``: the MoE block of a layer. ``expert`` (per-expert layouts): the prefix of one expert's
    tensors, followed by a name of ``projections`` and a suffix such as ``.weight`` or
    ``.weight_scale_inv``. ``fused`` (where ``expert`` is None): the prefix of the tensors with all
    experts along axis 0; suffixes such as ``_blocks``, ``_scales`` and ``_bias`` may follow. Where flat,
    each expert is as many consecutive rows of axis 0 as it is wide. ``per_expert_rows``: other tensors
    with one entry per expert (router weight, biases) and the axis that counts experts; where a family
    has two layouts, in the same order. ``tables``: tensors whose values are expert numbers, [vocabulary, K].
    ``whole``: prefixes in the block of what holds nothing per expert, whatever its shape.
    """

    name: Literal["per-expert", "fused", "flat"]
    block: str
    per_expert_rows: Mapping[str, int]
    expert: str | None = None
    fused: str = "{block}.experts."
    # Role -> name on disk; roles are gate, up, down (and gate_up where fused).
    projections: Mapping[str, str]
    # Fused matrices as [E, in, out] instead of [E, out, in].
    transposed: bool = False
    tables: tuple[str, ...] = ()
    shared: str | None = None
    whole: tuple[str, ...] = ()

    @cached_property
    def expert_pattern(self) -> re.Pattern[str]:
        """Matches tensors that belong to one expert: groups layer, expert, projection, suffix."""
        if self.expert is None:
            return re.compile(r"(?!)")
        prefix = self._filled(self.expert)
        names = "|".join(map(re.escape, self.projections.values()))
        return re.compile(rf"{prefix}(?P<projection>{names})(?P<suffix>\..+)")

    @cached_property
    def fused_pattern(self) -> re.Pattern[str]:
        """Matches tensors that hold all experts along axis 0: groups layer, projection, suffix."""
        if self.expert is not None:
            return re.compile(r"(?!)")
        names = "|".join(map(re.escape, self.projections.values()))
        return re.compile(rf"{self._filled(self.fused)}(?P<projection>{names})(?P<suffix>([._].+)?)")

    @cached_property
    def row_patterns(self) -> tuple[tuple[re.Pattern[str], int], ...]:
        """Match the other tensors with one entry per expert; with each the axis of the experts."""
        return tuple((re.compile(self._filled(name)), axis) for name, axis in self.per_expert_rows.items())

    @cached_property
    def table_pattern(self) -> re.Pattern[str]:
        """Matches tensors whose values are expert numbers."""
        return re.compile("|".join(map(self._filled, self.tables)) or r"(?!)")

    @cached_property
    def anything_of_experts(self) -> re.Pattern[str]:
        """Matches every tensor under the experts' prefix, known or not."""
        prefix = self.fused if self.expert is None else "{block}.experts."
        return re.compile(rf"{self._filled(prefix)}.+")

    @cached_property
    def shared_pattern(self) -> re.Pattern[str]:
        if self.shared is None:
            return re.compile(r"(?!)")
        return re.compile(rf"{self._filled(self.shared)}.+")

    @cached_property
    def whole_pattern(self) -> re.Pattern[str]:
        """Matches tensors of the block that hold nothing per expert."""
        return re.compile("|".join(rf"{self._filled(prefix)}.+" for prefix in self.whole) or r"(?!)")

    @cached_property
    def companion_patterns(self) -> tuple[re.Pattern[str], ...]:
        """Match what is per expert by its name in any family: groups layer and ``part``, the name in its module."""
        weight = next(name for name in self.per_expert_rows if name.endswith(".weight"))
        router = weight.removesuffix(".weight")
        found = ((router, (*ROUTER_SCALES, *ROUTER_ROWS, *SELECTION_BIASES)), ("{block}", SELECTION_BIASES))
        return tuple(
            re.compile(rf"{self._filled(module)}\.(?P<part>{'|'.join(map(re.escape, parts))})")
            for module, parts in found
        )

    @cached_property
    def block_pattern(self) -> re.Pattern[str]:
        """Matches every tensor of the block; group ``layer``."""
        return re.compile(rf"{self._filled('{block}')}\..+")

    def under(self, prefix: str, other: str) -> Layout:
        """Return the same layout for layers that are named ``other`` where these are named ``prefix``."""
        assert self.block.startswith(prefix)
        shared = self.shared and self.shared.replace(prefix, other, 1)
        return replace(self, block=self.block.replace(prefix, other, 1), shared=shared)

    def _filled(self, template: str) -> str:
        return _pattern(template.replace("{block}", self.block))


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
    # The number of experts per token of a router that does not ask its config.
    fixed_top_k: int | None = None
    moe_layers: MoeLayers = field(default_factory=MoeLayers)
    layer: str = "model.layers.{layer}"
    # Extra layers for multi-token prediction: how many are numbered on behind the last one, or what they are
    # called, counted from 0. Of several names the first has the layer itself.
    mtp_key: str | None = None
    mtp_layer: tuple[str, ...] = ()
    # Prefixes of what mixes tokens; with more than one, a layer has those of its kind.
    attention: tuple[str, ...] = ("model.layers.{layer}.self_attn.",)
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    # What transformers takes where config.json does not say whether the head is the embedding.
    tied_by_default: bool = False
    # What else a layer has, by the names of the first layout; None: not described, and not checked.
    parts: tuple[Parts, ...] | None = None
    # Of those what transformers takes where config.json does not say.
    size_defaults: SizeDefaults = field(default_factory=dict)
    router: RouterRule
    layouts: tuple[Layout, ...]
    # Where the running model keeps its parts (transformers 5): block, router and experts in it.
    block_module: str = "model.layers.{layer}.mlp"
    router_module: str = "gate"
    experts_module: str = "experts"
    # The bias that takes part in the choice only, seen from the block.
    bias_module: str = "gate.e_score_correction_bias"
    # The layout of the running model, where it is none of ``layouts``.
    running: Layout | None = None
    # The transformers release whose router modules recovery can train; None: any that we run with.
    trained_since: str | None = None
    # Why commands that run the model refuse this family; None: they run it.
    not_run: str | None = None

    @property
    def in_memory(self) -> Layout:
        """How transformers 5 holds the experts of a running model: all of them in one tensor."""
        return self.running or next(layout for layout in self.layouts if layout.name == "fused")

    @cached_property
    def layer_pattern(self) -> re.Pattern[str]:
        """Matches any tensor of a layer; group ``layer``."""
        return re.compile(rf"{_pattern(self.layer)}\..+")

    def stray_pattern(self, layout: Layout) -> re.Pattern[str]:
        """Matches what a mixture has in ``layout``, wherever it is: outside the known layers, something unknown."""
        block = layout.under(f"{self.layer}.", "")
        parts = (block.anything_of_experts, block.table_pattern, *(pattern for pattern, _axis in block.row_patterns))
        return re.compile(rf"(.*\.)?({'|'.join(part.pattern for part in parts)})")

    @cached_property
    def mtp_pattern(self) -> re.Pattern[str]:
        """Matches any tensor of a layer for multi-token prediction that has a name of its own; group ``layer``."""
        # A group may be named once only: what is before the number, then the number.
        before = [template.partition("{layer}")[0] for template in self.mtp_layer]
        return re.compile(rf"(?:{'|'.join(map(re.escape, before))}){_pattern('{layer}')}\..+" if before else r"(?!)")


def _pattern(template: str) -> str:
    """Turn a name with placeholders into a regular expression."""
    pattern = re.escape(template)
    for placeholder in ("layer", "expert"):
        pattern = pattern.replace(re.escape("{" + placeholder + "}"), rf"(?P<{placeholder}>0|[1-9]\d{{0,5}})")
    return pattern
