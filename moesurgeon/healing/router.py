"""Fitting a router to the experts that are left, without running them again.

Once all survivors have run on a token, what any choice among them leaves of its target is linear algebra. With f_e
their outputs and t the routed part of the target (the block's target less what its shared experts give),

    |t - sum_e w_e f_e|^2 = |t|^2 - 2 w b + w G w,    G = <f_i, f_j>, b = <f_j, t>,

no hidden dimension left in it. The weights w follow from the router's logits by the family's own rule, and the logits
from its weight W, which is fitted by Adam on a relaxation of that error:

- one expert per token: the expected error of a choice by the scores, sum_e q_e |t - w_e f_e|^2, with q the scores as
  shares among those that can be chosen (for a softmax the softmax itself) and w_e the weight that e alone would get;
- several: the error of the hard choice itself, whose gradient goes straight through the choice (Bengio, Leonard,
  Courville 2013): with p the scores and m the mask of the chosen, g = sg(p) m + p - sg(p) in place of the scores.

A selection bias and groups take part in the choice by the family's rule, and are left alone. The state with the least
error of the real, hard choice on held-out tokens counts.

Legend: N tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.observe import logits_in
from moesurgeon.engine.routing import Routing, selection_bias
from moesurgeon.healing.block import Values, experts_name, output_of, own_values
from moesurgeon.healing.data import BlockData
from moesurgeon.healing.distil import rate

STEPS, TOKENS_PER_STEP, JUDGE_EVERY, PATIENCE = 300, 2048, 25, 4
STRIDE = 0.05
"""By how much a step may change a logit, about: the learning rate is that over the mean |x|_1 of a token."""
PRODUCTS_BYTES = 256 << 20
OUTPUTS_BYTES = 128 << 20
"""Memory for the products of each text, and for the outputs of a chunk: beyond it tokens are sampled."""


@dataclass(frozen=True)
class Products:
    """Of tokens: ``inputs`` [N, H], ``offset`` [N, E] (logits less W x: a router's own bias, and rounding),
    ``gram`` [N, E, E], ``along`` b [N, E] and ``square`` |t|^2 [N]; float32."""

    inputs: torch.Tensor
    offset: torch.Tensor
    gram: torch.Tensor
    along: torch.Tensor
    square: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def at(self, rows: torch.Tensor) -> Products:
        return Products(*(each[rows] for each in vars(self).values()))

    def logits(self, weight_EH: torch.Tensor) -> torch.Tensor:
        return F.linear(self.inputs, weight_EH) + self.offset

    def errors(self, weights_NE: torch.Tensor) -> torch.Tensor:
        """Return |t - sum_e w_e f_e|^2 [N]."""
        pairs = torch.einsum("ne,nef,nf->n", weights_NE, self.gram, weights_NE)
        return self.square - 2 * (weights_NE * self.along).sum(-1) + pairs


@dataclass(frozen=True)
class Gate:
    """How the block chooses: ``routing`` is its rule for ``top_k`` experts, ``bias`` [E] takes part in the choice."""

    routing: Routing
    top_k: int
    bias: torch.Tensor | None

    def weights(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """Return the weights [N, E] of the hard choice, zero where an expert is not chosen."""
        scores = self.routing.scores(logits_NE)
        chosen = self.routing.choose(scores, self.bias, self.top_k)
        return torch.zeros_like(scores).scatter(-1, chosen, self.routing.weights(scores, chosen))

    def relaxed(self, logits_NE: torch.Tensor, products: Products) -> torch.Tensor:
        """Return what is minimised of each token [N], differentiable in the logits."""
        routing = self.routing
        scores = routing.scores(logits_NE)
        ranked = routing.ranked(scores, self.bias)
        if self.top_k == 1:
            shares = ranked.clamp(min=0)  # -inf outside the groups that were chosen
            shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-9)
            single = scores.reshape(-1, 1)  # each expert as the only choice
            alone = routing.weights(single, torch.zeros_like(single, dtype=torch.int64)).view_as(scores)
            squares = products.gram.diagonal(dim1=-2, dim2=-1)
            return (shares * (products.square[:, None] - 2 * alone * products.along + alone.square() * squares)).sum(-1)
        mask = torch.zeros_like(scores).scatter(-1, ranked.topk(self.top_k, dim=-1).indices, 1.0)
        through = scores.detach() * mask + scores - scores.detach()
        if routing.renormalises:
            through = through / (through.sum(-1, keepdim=True) + routing.epsilon)
        return products.errors(through * routing.scale)


def router_weight(block: MoeBlock) -> str | None:
    """Return the name of the router's weight [E, H] in the block; None for a router that has not just one."""
    experts = len(block.experts.down_proj)  # type: ignore[arg-type]
    ours = {id(each) for each in block.router.parameters() if each.ndim == 2 and len(each) == experts}
    names = [name for name, parameter in block.module.named_parameters() if id(parameter) in ours]
    return names[0] if len(names) == 1 else None


def fitted_router(
    block: MoeBlock, start: Values, train: BlockData, heldout: BlockData, routing: Routing, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return a better weight of the block's router, by its name in the block; nothing where none is better.

    ``start``: values in place of the block's own, as refits have left them. ``routing``: the rule of the student.
    """
    name = router_weight(block)
    if name is None:
        return {}
    values = {**own_values(block), **start}
    learn, judge = (products_of(block, values, sampled(data, block, seed), name) for data in (train, heldout))
    gate = Gate(routing, train.indices.shape[-1], selection_bias(block))
    found = fit(values[name], learn, judge, gate, seed=seed)
    return {} if found is None else {name: found.to(values[name].dtype)}


def fit(
    weight: torch.Tensor, train: Products, heldout: Products, gate: Gate, *, steps: int = STEPS, seed: int = 0
) -> torch.Tensor | None:
    """Return the weight [E, H] with the least hard error on ``heldout``; None if that is ``weight``."""
    master = weight.float().clone().requires_grad_()
    stride = STRIDE / max(1e-9, float(train.inputs.abs().sum(-1).mean()))
    optimizer = torch.optim.Adam([master], lr=stride, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    scale = float(train.square.mean()) or 1.0
    generator = torch.Generator().manual_seed(seed)
    least, best, waited = hard_error(weight.float(), heldout, gate), None, 0
    for step in range(1, steps + 1):
        rows = torch.randint(len(train), (min(TOKENS_PER_STEP, len(train)),), generator=generator)
        some = train.at(rows.to(train.inputs.device))
        loss = gate.relaxed(some.logits(master), some).mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % JUDGE_EVERY == 0 or step == steps:
            error = hard_error(master.detach(), heldout, gate)
            waited = 0 if error < least else waited + 1
            if error < least:
                least, best = error, master.detach().clone()
            if waited >= PATIENCE:
                break
    return best


@torch.no_grad()
def hard_error(weight: torch.Tensor, products: Products, gate: Gate) -> float:
    """Return the mean squared error of the choice that a router with ``weight`` [E, H] makes."""
    return float(products.errors(gate.weights(products.logits(weight))).mean())


@torch.no_grad()
def products_of(block: MoeBlock, values: Values, data: BlockData, name: str) -> Products:
    """Run all experts of the block with ``values`` on ``data``; ``name``: of the router's weight."""
    gate_ups, downs = (values[f"{experts_name(block)}.{each}"] for each in ("gate_up_proj", "down_proj"))
    experts, weight, found = len(downs), values[name].float(), []
    size = max(1, OUTPUTS_BYTES // (4 * experts * downs.shape[1]))
    act: Callable[[torch.Tensor], torch.Tensor] = block.experts.act_fn  # type: ignore[assignment]
    for rows, inputs, target in data.chunks(downs.device, size):
        seen: list[torch.Tensor] = []
        hook = block.router.register_forward_hook(lambda *given, seen=seen: seen.append(logits_in(given[2])))
        try:
            missing = target.float() - output_of(block, values, inputs).float()
        finally:
            hook.remove()
        outputs = inputs.new_empty(len(inputs), experts, downs.shape[1], dtype=torch.float32)
        for expert in range(experts):
            gate, up = F.linear(inputs, gate_ups[expert]).chunk(2, dim=-1)
            outputs[:, expert] = F.linear(act(gate) * up, downs[expert]).float()
        weights = torch.zeros(len(inputs), experts, device=inputs.device)
        weights.scatter_add_(-1, data.indices[rows].to(inputs.device), data.weights[rows].to(weights))
        wanted = missing + torch.einsum("ne,neh->nh", weights, outputs)
        root = data.importance[rows].sqrt().to(inputs.device)  # so that errors count by importance
        wanted, outputs = wanted * root[:, None], outputs * root[:, None, None]
        found.append(
            Products(
                inputs.float(),
                seen[0].reshape(-1, experts).float() - F.linear(inputs.float(), weight),
                torch.bmm(outputs, outputs.transpose(1, 2)),
                torch.einsum("neh,nh->ne", outputs, wanted),
                wanted.square().sum(-1),
            )
        )
    return Products(*(torch.cat(parts) for parts in zip(*(vars(each).values() for each in found), strict=True)))


def sampled(data: BlockData, block: MoeBlock, seed: int) -> BlockData:
    """Return ``data``, or so many tokens of it, drawn by ``seed``, as products are held of."""
    most = PRODUCTS_BYTES // product_bytes(len(block.experts.down_proj), data.inputs.shape[1])  # type: ignore[arg-type]
    if len(data) <= most:
        return data
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    return data.at(rows)


def product_bytes(experts: int, hidden: int) -> int:
    """Return what products take of a token."""
    return 4 * (hidden + experts * (experts + 2) + 1)


def fit_bytes(experts: int, hidden: int) -> int:
    """Return what a fit takes at most: the products of both texts, twice while they are put together, a chunk of
    outputs, and what a step keeps."""
    step = TOKENS_PER_STEP * product_bytes(experts, hidden) + 4 * 4 * experts * hidden
    return 3 * PRODUCTS_BYTES + 2 * OUTPUTS_BYTES + 3 * step
