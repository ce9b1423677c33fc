"""Low-rank adapters on routers, through peft; read back as plain weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel

from moesurgeon.engine.model import moe_blocks
from moesurgeon.surgery.anatomy import Anatomy

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The dtypes, as safetensors spells them, in which a trained router can be written."""


def adapt_routers(model: PreTrainedModel, anatomy: Anatomy, *, rank: int) -> PeftModel:
    """Put a LoRA adapter of ``rank`` on every router of ``model`` and freeze everything else.

    Routers are parameters, not Linear layers, in transformers 5: they are named in full, since peft
    ignores ``layers_to_transform`` for parameters. The adapter starts at zero.
    """
    paths = [f"{block.name}.{anatomy.family.router_module}.weight" for block in moe_blocks(model, anatomy)]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=[], target_parameters=paths, bias="none"
    )
    with warnings.catch_warnings():
        # peft warns that no module is targeted, which is what target_parameters means.
        warnings.simplefilter("ignore")
        adapted: PeftModel = get_peft_model(model, config)
    return adapted


@torch.no_grad()
def adapted_routers(model: PeftModel, anatomy: Anatomy) -> dict[int, torch.Tensor]:
    """Return each layer's router weight [E, H] with its adapter merged, rounded as it will be stored."""
    return {
        layer: (wrapper.get_param().float() + wrapper.get_delta_weight("default").float())
        .to(STORED[anatomy.tensors[anatomy.router_weight(layer)].dtype])
        .cpu()
        for layer, wrapper in _wrappers(model, anatomy).items()
    }


@contextmanager
def running_with(model: PeftModel, anatomy: Anatomy, routers: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Inside the context ``model`` runs with these router weights in place of its own and its adapters.

    So a state is judged as it will be written: rounding a router to bfloat16 can undo a small gain.
    """
    weights = {layer: wrapper.get_param() for layer, wrapper in _wrappers(model, anatomy).items()}
    originals = {layer: weight.detach().clone() for layer, weight in weights.items()}
    with model.disable_adapter():
        try:
            for layer, weight in weights.items():
                weight.data.copy_(routers[layer])
            yield
        finally:
            for layer, weight in weights.items():
                weight.data.copy_(originals[layer])


def _wrappers(model: PeftModel, anatomy: Anatomy) -> dict[int, ParamWrapper]:
    """Return the adapted router of each layer."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    return dict(zip(anatomy.moe_layers, wrappers, strict=True))
