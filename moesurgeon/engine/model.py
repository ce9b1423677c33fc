"""A checkpoint as a running model, and its mixture-of-experts blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesurgeon.checkpoint.open import Checkpoint
from moesurgeon.engine import deepseek_v1
from moesurgeon.engine.device import Placement
from moesurgeon.errors import CheckpointError
from moesurgeon.families.keys import count_of
from moesurgeon.surgery.anatomy import Anatomy

deepseek_v1.register()


@dataclass(frozen=True, slots=True)
class MoeBlock:
    """One mixture of experts in a running model: the layer's number and its modules.

    ``bias_holder`` has the selection bias, if the family has one, under ``bias_name``.
    """

    layer: int
    name: str
    router: nn.Module
    experts: nn.Module
    bias_holder: nn.Module | None
    bias_name: str


def load_model(checkpoint: Checkpoint, anatomy: Anatomy, placement: Placement) -> PreTrainedModel:
    """Load the whole model, ready for inference.

    Raises CheckpointError if a tensor is missing, unexpected (layers for multi-token prediction apart)
    or does not fit; a model never runs with weights that are not the checkpoint's. Also for a family
    whose blocks moesurgeon cannot follow.
    """
    refuse_unrunnable(anatomy)
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.root,
                dtype=placement.dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # an untrusted config makes transformers raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load {checkpoint.root}: {reason}"
        ) from error
    mtp = {f"model.layers.{layer}." for layer in anatomy.by_layer if layer >= anatomy.layers}
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(tuple(mtp))]
    for what, names in (("lacks", info["missing_keys"]), ("has the unknown", unexpected)):
        if names:
            raise CheckpointError(
                f"{checkpoint.root} {what} {sorted(names)[0]} and {len(names) - 1} more; it cannot run"
            )
    return model.to(placement.device).eval()


def refuse_unrunnable(anatomy: Anatomy) -> None:
    """Raise CheckpointError if this family, or this config of it, cannot be run and observed."""
    reason = anatomy.family.not_run
    if reason is None and len(set(anatomy.top_ks)) > 1:
        reason = "its layers route to different numbers of experts"
    if reason is not None:
        raise CheckpointError(
            f"{anatomy.family.title} checkpoints cannot be run by moesurgeon: {reason}; "
            "inspect, retop, prune --keep-experts and verify need no running model"
        )


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
                block.get_submodule(router),
                block.get_submodule(experts),
                block.get_submodule(holder) if anatomy.family.router.selection_bias else None,
                bias,
            )
        )
    return blocks


def context_length(anatomy: Anatomy) -> int:
    """Return the longest sequence that the checkpoint was made for (1024 if it does not say)."""
    return count_of(anatomy.config, "max_position_embeddings", 1024) or 1024


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own bars and advice off the user's terminal while it loads."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return logits [B, T, V] for token ids [B, T]; ``mask`` [B, T] is 0 where there is padding."""
    logits: torch.Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits
