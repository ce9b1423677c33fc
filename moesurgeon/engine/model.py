"""The mixture-of-experts blocks of a running model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moesurgeon.families.keys import count_of
from moesurgeon.surgery.anatomy import Anatomy


@dataclass(frozen=True, slots=True)
class MoeBlock:
    """One mixture of experts in a running model: the layer's number and its modules.

    ``bias_holder`` has the selection bias, if the family has one, under ``bias_name``.
    """

    layer: int
    name: str
    module: nn.Module
    router: nn.Module
    experts: nn.Module
    bias_holder: nn.Module | None
    bias_name: str


def moe_blocks(model: nn.Module, anatomy: Anatomy) -> list[MoeBlock]:
    """Return the mixture-of-experts blocks of ``model``, first layer first."""
    blocks = []
    for layer in anatomy.moe_layers:
        name = anatomy.family.block_module.replace("{layer}", str(layer))
        block = model.get_submodule(name)
        router, experts = anatomy.family.router_module, anatomy.family.experts_module
        holder, _, bias = anatomy.family.bias_module.rpartition(".")
        blocks.append(
            MoeBlock(
                layer,
                name,
                block,
                block.get_submodule(router),
                block.get_submodule(experts),
                block.get_submodule(holder) if anatomy.family.router.selection_bias else None,
                bias,
            )
        )
    return blocks


def shared_experts(block: MoeBlock) -> tuple[str, Any] | None:
    """Return name and module of the shared experts, if there are any in the block."""
    for name, module in block.module.named_children():
        if name.startswith("shared") and any(module.children()):  # not the gate on Qwen2-MoE's
            return name, module
    return None


def context_length(anatomy: Anatomy) -> int:
    """Return the longest sequence that the checkpoint was made for (1024 if it does not say)."""
    return count_of(anatomy.config, "max_position_embeddings", 1024) or 1024


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return logits [B, T, V] for token ids [B, T]; ``mask`` [B, T] is 0 where there is padding."""
    logits: torch.Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits
