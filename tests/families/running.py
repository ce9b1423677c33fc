"""Running checkpoints with stock transformers, and the experiment that pruning is held against.

Written without moesurgeon, apart from the classes for DeepSeek-MoE v1 that transformers does not have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import moesurgeon.engine.deepseek_v1  # noqa: F401 - registers "deepseek" with the Auto classes

Dropped = Mapping[int, Sequence[int]]
"""Layer -> experts that are gone."""


def load_stock(folder: Path, ignore: str | None = None) -> PreTrainedModel:
    """Load ``folder`` in float32; every tensor must have its place and every place its tensor.

    ``ignore``: the prefix of tensors that stock models leave aside (multi-token prediction).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    unexpected = [key for key in info["unexpected_keys"] if ignore is None or not key.startswith(ignore)]
    assert not info["missing_keys"] and not unexpected and not info["mismatched_keys"], info
    return model.eval()


def tokens_for(model: PreTrainedModel, rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens_for(model), use_cache=False).logits
    return logits


def routers_of(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the routers by layer: what is called ``gate`` or ``router`` and has a top-k."""
    return {
        int(name.split(".")[2]): module
        for name, module in model.named_modules()
        if name.endswith((".gate", ".router")) and hasattr(module, "top_k")
    }


def selection_biases_of(model: PreTrainedModel) -> dict[int, torch.Tensor]:
    """Return by layer the bias that takes part in the choice only, wherever the family keeps it."""
    return {
        int(name.split(".")[2]): tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name.endswith(("e_score_correction_bias", "expert_bias"))
    }


def logits_expert_by_expert(model: PreTrainedModel, dropped: Dropped | None = None) -> torch.Tensor:
    """Return the logits with ``dropped`` masked in the routers, free of rounding that depends on their number.

    Two sums of a router are rounded differently for another number of experts: a matrix product of
    another shape runs in other kernels, and softmax adds a longer row in another order (both seen
    to move the last bit). Here each router logit is a sum of its own and the softmax is correctly
    rounded; all else is the stock model, so that what remains must agree to the last bit.
    """
    with _ExpertByExpert() as mode, _masked(model, dropped or {}, mode):
        logits = logits_of(model)
    assert mode.products == len(routers_of(model)), "not every router was seen at work"
    return logits


class _ExpertByExpert(TorchFunctionMode):
    """While a router runs: its product and its softmax one by one, with ``mask`` [E] added to the logits."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.mask is not None and func is F.linear:
            self.products += 1
            hidden_TH, weight_EH, bias_E = [*args, None][:3]
            logits_TE = (hidden_TH.flatten(0, -2)[:, None, :] * weight_EH[None]).sum(-1)
            return (logits_TE if bias_E is None else logits_TE + bias_E) + self.mask
        if self.mask is not None and func in (F.softmax, torch.softmax, torch.Tensor.softmax):
            return torch.tensor([_softmax(row) for row in args[0].tolist()], dtype=torch.float32)
        return func(*args, **kwargs)


def _softmax(row: list[float]) -> list[float]:
    powers = [math.exp(logit - max(row)) for logit in row]
    total = math.fsum(powers)
    return [power / total for power in powers]


@contextmanager
def _masked(model: PreTrainedModel, dropped: Dropped, mode: _ExpertByExpert) -> Iterator[None]:
    """Push the dropped experts' logits out of reach while their router runs (sparsemixer divides by them: no -inf).

    A sigmoid router chooses by score plus bias, and the sigmoid is 0 at the least: there the bias is
    masked as well, else a dropped expert with a large bias would be chosen with weight 0.
    """
    hooks = []
    biases = selection_biases_of(model)
    for layer, router in routers_of(model).items():
        gone = list(dropped.get(layer, ()))
        mask = torch.zeros(next(router.parameters()).shape[0])
        mask[gone] = -1e30
        if layer in biases:
            biases[layer].data[..., gone] = -math.inf

        def start(_module: nn.Module, _inputs: Any, mask: torch.Tensor = mask) -> None:
            mode.mask = mask

        def stop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            mode.mask = None

        hooks += [router.register_forward_pre_hook(start), router.register_forward_hook(stop)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
