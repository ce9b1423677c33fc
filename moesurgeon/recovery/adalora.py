"""AdaLoRA on routers: adapters in the form of a singular value decomposition, whose ranks go where they matter.

    W + s B diag(e) A / R0,    ranks e of all routers together from R0 each down to R on average

While training, triplets (a row of A, a value of e, a column of B) that matter least to the loss, over all routers, have
their value set to zero (Zhang et al., arXiv:2303.10512); what is left says which router needs capacity. peft knows
AdaLoRA for Linear layers only, and routers are parameters: each gets a Linear child that holds the same parameter, and
the router's forward of ``recovery.estimator`` calls it.

Legend: E experts, H hidden, R0 rank at first, R rank on average in the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from moesurgeon.errors import UsageError
from moesurgeon.recovery.estimator import LINEAR
from moesurgeon.recovery.targets import Target
from moesurgeon.surgery.anatomy import Anatomy

_ADAPTER = "default"
# Shares of the steps before ranks begin to fall, and after the last has fallen.
_BEFORE, _AFTER = 0.1, 0.3
LEAST_STEPS = 10
"""Fewer leave no time to find out what matters."""
ORTHOGONAL = 0.1
"""Coefficient of :meth:`AdaLora.penalty`; of those tried in the paper the smallest."""


def first_rank(rank: int, experts: int, hidden: int) -> int:
    """Return R0: half as much again as ``rank``, as in the paper, but no more than a router [E, H] has.

    >>> first_rank(4, 64, 2048), first_rank(7, 8, 128)
    (6, 8)
    """
    return min(math.ceil(1.5 * rank), experts, hidden)


def refuse_ranks(anatomy: Anatomy, rank: int, steps: int) -> None:
    """Raise UsageError where there would be nothing to choose among, or no time to."""
    first = first_rank(rank, anatomy.experts, anatomy.hidden)
    if first <= rank:
        raise UsageError(
            f"--adapter adalora has no ranks to take away from --rank {rank}: a router of {anatomy.experts} experts "
            f"has {first} at most; give a lower --rank"
        )
    if steps < LEAST_STEPS:
        raise UsageError(f"--adapter adalora takes ranks away step by step; give at least --steps {LEAST_STEPS}")


class AdaLora:
    """``model`` with AdaLoRA adapters on the routers ``targets``; at first it computes what it did.

    ``rank``: R; ``steps``: of the whole training.
    """

    def __init__(self, model: PreTrainedModel, targets: Sequence[Target], *, rank: int, steps: int) -> None:
        self.first = min(first_rank(rank, *target.weight.shape) for target in targets)
        for target in targets:
            experts, hidden = target.weight.shape
            linear = nn.Linear(hidden, experts, bias=False, device="meta")
            linear.weight = target.weight
            target.module.add_module(LINEAR, linear)
        config = AdaLoraConfig(
            init_r=self.first,
            target_r=rank,
            lora_alpha=2 * self.first,  # peft divides by the rank at first: the scale is that of the LoRA adapters
            lora_dropout=0.0,
            target_modules=[_linear_of(target) for target in targets],
            total_step=steps,
            tinit=int(steps * _BEFORE),
            tfinal=int(steps * _AFTER),
            bias="none",
        )
        self.model: PeftModel = get_peft_model(model, config)
        self._layers: dict[str, Any] = {target.name: target.module.get_submodule(LINEAR) for target in targets}
        self._numbers = {target.name: target.layer for target in targets}
        for layer in self._layers.values():
            for factors in (layer.lora_A, layer.lora_E, layer.lora_B):
                factors[_ADAPTER].data = factors[_ADAPTER].data.float()
            # Already what the penalty asks for. As peft begins them (0.02 and normal) the first gradients are a
            # thousandth of a LoRA adapter's, and near to what rounding leaves.
            nn.init.orthogonal_(layer.lora_A[_ADAPTER])
            nn.init.orthogonal_(layer.lora_B[_ADAPTER])

    @property
    def names(self) -> tuple[str, ...]:
        """The routers' weights, by running name."""
        return tuple(self._layers)

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Return A [R0, H], the values [R0, 1] and B [E, R0] of the router ``name``."""
        layer = self._layers[name]
        return layer.lora_A[_ADAPTER], layer.lora_E[_ADAPTER], layer.lora_B[_ADAPTER]

    def delta(self, name: str) -> torch.Tensor:
        """Return what is added to the weight [E, H] of the router ``name``."""
        delta: torch.Tensor = self._layers[name].get_delta_weight(_ADAPTER).detach()
        return delta

    def plain(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [R0, H] and B [E, R0] whose plain product is :meth:`delta`."""
        down, values, up = (each.detach() for each in self.factors(name))
        layer = self._layers[name]
        return down, up * (values.T * layer.scaling[_ADAPTER] / (layer.ranknum[_ADAPTER] + 1e-5))

    def penalty(self) -> torch.Tensor:
        """Return the mean over routers of |A A' - 1|^2 + |B' B - 1|^2 (eq. 4): without it values say nothing."""
        terms = []
        for name in self._layers:
            down, _, up = self.factors(name)
            one = torch.eye(len(down), device=down.device)
            terms.append((down @ down.T - one).square().sum() + (up.T @ up - one).square().sum())
        return torch.stack(terms).mean()

    def allocate(self, step: int) -> None:
        """Take note of what mattered in ``step``, whose gradients are still there, and set values to zero."""
        self.model.base_model.update_and_allocate(step)

    def ranks(self) -> dict[str, int]:
        """Return by layer how many values are not zero."""
        return {str(self._numbers[name]): int(self.factors(name)[1].count_nonzero()) for name in self._layers}

    def state(self) -> dict[str, Any]:
        """Return what the choice of ranks goes on from: importance so far, and who is left."""
        allocator = self.model.base_model.rankallocator
        return {
            "pattern": self._config.rank_pattern,
            **{name: {key: each.cpu().clone() for key, each in getattr(allocator, name).items()} for name in _KEPT},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        allocator, devices = self.model.base_model.rankallocator, dict(self._devices())
        self._config.rank_pattern = state["pattern"]
        for name in _KEPT:
            setattr(allocator, name, {key: each.to(devices[key]) for key, each in state[name].items()})

    @property
    def _config(self) -> AdaLoraConfig:
        config: AdaLoraConfig = self.model.peft_config[_ADAPTER]
        return config

    def _devices(self) -> Iterator[tuple[str, torch.device]]:
        return ((name, each.device) for name, each in self.model.base_model.model.named_parameters())


_KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What peft's allocator keeps from step to step."""


def _linear_of(target: Target) -> str:
    return f"{target.name.rpartition('.')[0]}.{LINEAR}"
