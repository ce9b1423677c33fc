"""Low-rank adapters on routers, through peft; read back as plain weights."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel

from moesurgeon.engine.model import moe_blocks
from moesurgeon.surgery.anatomy import Anatomy


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


def adapted_routers(model: PeftModel, anatomy: Anatomy) -> dict[int, torch.Tensor]:
    """Return each layer's router weight [E, H] with its adapter merged, in float32 on the CPU."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == len(anatomy.moe_layers)
    with torch.no_grad():
        return {
            layer: (wrapper.get_param().float() + wrapper.get_delta_weight("default").float()).cpu()
            for layer, wrapper in zip(anatomy.moe_layers, wrappers, strict=True)
        }
