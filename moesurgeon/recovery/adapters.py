"""What is trained, and how it becomes plain weights: adapters through peft, masters of whole routers.

Whatever the precision of the model, what the optimiser changes is float32: the two factors of an adapter, or a master
of a router whose rounding the model runs with. Otherwise steps smaller than half a unit in the last place of a
bfloat16 weight would be lost.

Legend: E experts, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from moesurgeon.recovery.adalora import ORTHOGONAL, AdaLora
from moesurgeon.recovery.targets import PARTS, Experts, Kind, Part, Target

_ADAPTER = "default"


class Adapted:
    """``model`` with everything frozen but adapters and masters for ``targets``; at first it computes what it did.

    ``rank``: of every adapter, with ``kind`` "adalora" on average after ``steps``. ``experts``: those of a layer that
    are trained (None: all); the others have no gradient and stay as they are to the bit. ``model`` is the one to call
    while training. ``svd``: AdaLoRA's side of it, if it is that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Sequence[Target],
        *,
        rank: int,
        experts: Experts | None = None,
        kind: Kind = "lora",
        steps: int = 0,
    ) -> None:
        self.targets = tuple(targets)
        model.requires_grad_(False)
        self._wrappers: dict[str, ParamWrapper] = {}
        self._masters: dict[str, _Master] = {}
        self.svd = AdaLora(model, targets, rank=rank, steps=steps) if kind == "adalora" else None
        self.model: Any = (
            self.svd.model
            if self.svd
            else _with_adapters(model, [each.name for each in targets if each.low_rank], rank)
        )
        for wrapper in (each for each in self.model.modules() if isinstance(each, ParamWrapper)):
            (name,) = (
                each.name
                for each in targets
                if wrapper.get_base_layer() is each.module and wrapper.parameter_name == each.parameter
            )
            self._wrappers[name] = wrapper
        for target in targets:
            if not target.low_rank:
                self._masters[target.name] = _master_of(target)
        for wrapper in self._wrappers.values():
            for factor in (wrapper.lora_A, wrapper.lora_B):
                factor[_ADAPTER].float()
        if experts is not None:
            for target in targets:
                if target.part == "experts":
                    self._only(target, experts.get(target.layer, frozenset()))

    def weights(self, part: Part | None = None) -> list[nn.Parameter]:
        """Return the float32 parameters that are trained, of one part or of all."""
        return [weight for target in self._of(part) for weight in self._trained(target)]

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of what is trained, on the CPU: small beside the weights it stands for."""
        return {key: weight.detach().cpu().clone() for key, weight in self._named()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor], importance: Mapping[str, Any] | None = None) -> None:
        """Go on from what :meth:`state`, and if training goes on :meth:`importance`, returned."""
        for key, weight in self._named():
            weight.copy_(state[key])
        if self.svd and importance:
            self.svd.load(importance)

    def importance(self) -> dict[str, Any]:
        """Return what the dealing out of ranks goes on from."""
        return self.svd.state() if self.svd else {}

    def ranks(self) -> dict[str, int] | None:
        """Return the routers' ranks by layer, where they are dealt out."""
        return self.svd.ranks() if self.svd else None

    def regularise(self) -> None:
        """Add to the gradients, in a backward pass of its own, that of what keeps the adapters in shape."""
        if self.svd:
            (ORTHOGONAL * self.svd.penalty()).backward()

    def allocate(self, step: int) -> None:
        """Deal ranks out anew after the optimiser's step of this number, whose gradients are still there."""
        if self.svd:
            self.svd.allocate(step)

    def merged(self, parts: Collection[Part] = PARTS) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the plain weights of ``parts`` by running name, in float32, one after the other."""
        for target in self.targets:
            if target.part in parts:
                yield target.name, self.merged_with(target, self._stored(target))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the context the model computes what it did before anything was trained."""
        with ExitStack() as stack:
            if self._wrappers or self.svd:
                stack.enter_context(self.model.disable_adapter())
            for master in self._masters.values():
                stack.enter_context(master.off())
            yield

    @contextmanager
    def running_with(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside the context the model runs with ``tensors``, by running name, in place of what they are trained from.

        So a state is judged as it will be written: rounding to bfloat16 can undo a small gain. What is not named is
        as it was before the training.
        """
        held = {target.name: self._stored(target) for target in self.targets if target.name in tensors}
        originals = {name: weight.data for name, weight in held.items()}
        with self.off():
            try:
                for name, weight in held.items():
                    weight.data = tensors[name].to(weight.device, weight.dtype).contiguous()
                yield
            finally:
                for name, weight in held.items():
                    weight.data = originals[name]

    def _of(self, part: Part | None) -> Iterator[Target]:
        return (target for target in self.targets if part in (None, target.part))

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for target in self.targets:
            for number, weight in enumerate(self._trained(target)):
                yield f"{target.name}.{number}", weight

    def _trained(self, target: Target) -> tuple[nn.Parameter, ...]:
        if self.svd:
            return self.svd.factors(target.name)
        if target.low_rank:
            wrapper = self._wrappers[target.name]
            return wrapper.lora_A[_ADAPTER].weight, wrapper.lora_B[_ADAPTER].weight
        return (self._masters[target.name].master,)

    def _stored(self, target: Target) -> nn.Parameter:
        """Return the parameter with the weight from before the training."""
        module: Any = target.module
        if parametrize.is_parametrized(module, target.parameter):
            original: nn.Parameter = module.parametrizations[target.parameter].original
            return original
        return target.weight

    @torch.no_grad()
    def merged_with(self, target: Target, weight: torch.Tensor) -> torch.Tensor:
        """Return the plain weight of ``target`` in float32, of the ``weight`` from before the training."""
        if not target.low_rank:
            return self._masters[target.name].master.detach().clone()
        if self.svd:
            return weight.detach().float() + self.svd.delta(target.name)
        wrapper = self._wrappers[target.name]
        down, up = (each.detach() for each in self._trained(target))
        if weight.dim() == 2:
            delta = up @ down
        else:  # peft's order: down [E x R, in], up [out, R x E]
            down_ERI = down.reshape(len(weight), -1, down.shape[-1])
            up_EOR = up.reshape(len(up), -1, len(weight)).permute(2, 0, 1)
            delta = up_EOR @ down_ERI
            if not getattr(wrapper, "_did_swap_in_out_features", False):
                delta = delta.transpose(1, 2)
        return weight.detach().float() + wrapper.scaling[_ADAPTER] * delta

    def _only(self, target: Target, experts: frozenset[int]) -> None:
        """Let gradients through to these experts of ``target`` alone."""
        down, up = self._trained(target)
        if (stored := self._stored(target)).dim() == 2:  # a shared one
            down.register_hook(torch.zeros_like)
            up.register_hook(torch.zeros_like)
            return
        count = len(stored)
        chosen = torch.tensor([float(expert in experts) for expert in range(count)], device=down.device)
        rank = len(down) // count
        rows, columns = chosen.repeat_interleave(rank)[:, None], chosen.repeat(rank)[None]
        down.register_hook(lambda gradient: gradient * rows)
        up.register_hook(lambda gradient: gradient * columns)


class _Master(nn.Module):
    """A parametrisation: the weight is the rounded master, through which gradients go as if it were not rounded."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.master = nn.Parameter(weight.detach().float().clone())
        self._is_on = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.master.to(weight.dtype) if self._is_on else weight

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = before


def _master_of(target: Target) -> _Master:
    master = _Master(target.weight)
    parametrize.register_parametrization(target.module, target.parameter, master)
    return master


def _with_adapters(model: PreTrainedModel, names: list[str], rank: int) -> PeftModel | PreTrainedModel:
    """Put LoRA adapters of ``rank`` (of each expert, where they are fused) on the parameters ``names``.

    Routers and fused experts are parameters, not Linear layers, in transformers 5: they are named in full, since
    peft ignores ``layers_to_transform`` for parameters. Adapters start at zero.
    """
    if not names:
        return model
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=[], target_parameters=names, bias="none"
    )
    with warnings.catch_warnings():
        # peft warns that no module is targeted, which is what target_parameters means.
        warnings.simplefilter("ignore")
        adapted: PeftModel = get_peft_model(model, config)
    return adapted
