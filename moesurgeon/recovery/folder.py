"""Adapters as peft's own folder: what plain peft puts on the checkpoint that was trained, loaded by stock transformers.

adapter_config.json           a LoraConfig that names every adapted parameter in full
adapter_model.safetensors     the factors in float32

The names are those of the running model. Two adapted parameters of one module are nested (``experts.base_layer``), in
an order that peft makes of the names alone. AdaLoRA's product of three is written as a LoRA adapter of two: peft has no
AdaLoRA on parameters.

Legend: E experts, H hidden, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from moesurgeon.checkpoint.faults import safetensors_errors
from moesurgeon.checkpoint.replaceable import Contents, Kind
from moesurgeon.errors import UsageError
from moesurgeon.recovery.adalora import AdaLora
from moesurgeon.recovery.adapters import Adapted

CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = Kind("an adapter", CONFIG, ("peft_type",), Contents(files=(CONFIG, _TENSORS, "README.md")))
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """What a folder holds; ``tensors`` are copies."""

    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    def save(self, folder: Path, base: str) -> None:
        """Write into the empty ``folder`` an adapter of the checkpoint ``base``."""
        config = copy.deepcopy(self.config)
        config.base_model_name_or_path, config.inference_mode = base, True
        config.target_parameters = sorted(config.target_parameters)  # peft makes a set of it: the same bytes each time
        config.task_type = "CAUSAL_LM"  # AutoPeftModelForCausalLM looks for it
        config.save_pretrained(str(folder))
        with safetensors_errors(folder / _TENSORS):
            save_file(self.tensors, folder / _TENSORS, {"format": "pt"})


def refuse_no_adapter(adapt: Sequence[str]) -> None:
    """Raise UsageError for what is trained without an adapter."""
    if "full-routers" in adapt:
        raise UsageError(
            "--save-adapter: whole routers are no adapter; train --adapt routers, or leave it out: the written "
            "checkpoint has them"
        )


def adapter_of(adapted: Adapted) -> Adapter | None:
    """Return the state of ``adapted`` as it is by now; None if something that is trained has no adapter."""
    if not all(target.low_rank for target in adapted.targets):
        return None
    if adapted.svd:
        return _of_product(adapted.svd)
    found = get_peft_model_state_dict(adapted.model, save_embedding_layers=False)
    (config,) = adapted.model.peft_config.values()
    return Adapter(config, {name: each.detach().cpu().clone().contiguous() for name, each in found.items()})


def _of_product(svd: AdaLora) -> Adapter:
    """Return W + B diag(e) A as LoRA: A [R, H] and B diag(e) [E, R], R the largest rank that a router kept."""
    rank = max(1, *svd.ranks().values())
    tensors = {}
    for name in svd.names:
        down, up = svd.plain(name)
        kept = up.abs().sum(0).argsort(descending=True, stable=True)[:rank].sort().values
        module = name.rpartition(".")[0]
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = down[kept].cpu().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = up[:, kept].cpu().contiguous()
    return Adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=list(svd.names)), tensors)
