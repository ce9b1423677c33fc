"""Which hidden unit of one expert is which of another: their order within an expert means nothing.

A unit a of a gated expert is a row of the gate and of the up projection and a column of the down projection,
w_a = (g_a, u_a, d_a), and has an activation h_a(x) = act(g_a x) u_a x. Units are alike if weights and activations
are: the similarity of a and b is cos(w_a, w_b) + cos(h_a, h_b), the cost of the pair what that is short of 2, and the
cheapest pairing is an assignment problem (Hungarian method). Weights and activations together are the cost of REAM
(https://arxiv.org/abs/2604.04356), there by distances and weights in 64 dimensions; aligning by assignment is older
(https://arxiv.org/abs/1912.05671, https://arxiv.org/abs/2209.04836).

(g, -u, -d) is the same function as (g, u, d), so that each pair is taken with the sign with which it is more alike.

Legend: n tokens, H hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

EXACT = 4096
"""Units that are assigned exactly: 3.7 s on a core at worst. It grows with the cube: 29 s for 8192."""

_TINY = 1e-30


@dataclass(frozen=True)
class Units:
    """The units of one expert: ``gate_up`` [2F, H], ``down`` [H, F], and their ``activations`` [n, F] on a sample."""

    gate_up: torch.Tensor
    down: torch.Tensor
    activations: torch.Tensor


def units_of(experts: Any, expert: int, inputs_nH: torch.Tensor) -> Units:
    """Return the units of ``expert`` with what they do on ``inputs_nH``."""
    gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    gate, up = F.linear(inputs_nH, gate_up).chunk(2, dim=-1)
    return Units(gate_up, down, (experts.act_fn(gate) * up).float())


def aligned(one: Units, other: Units) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (order [F], sign [F]): unit a of ``one`` is unit order[a] of ``other``, times sign[a]."""
    similarity, sign = similarities(one, other)
    order = torch.from_numpy(cheapest((2 - similarity).cpu().numpy())).to(sign.device)
    return order, sign.gather(1, order[:, None]).squeeze(1)


def similarities(one: Units, other: Units) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the similarity [F, F] of each unit with each, -1 to 2, and the sign +-1 at which it is taken."""
    up_mine, up_theirs = (units.gate_up.float().chunk(2)[1] for units in (one, other))
    gate_mine, gate_theirs = (units.gate_up.float().chunk(2)[0] for units in (one, other))
    down_mine, down_theirs = one.down.float(), other.down.float()
    mine, theirs = (
        (gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)).sqrt().clamp_min(_TINY)
        for gate, up, down in ((gate_mine, up_mine, down_mine), (gate_theirs, up_theirs, down_theirs))
    )
    signed = (up_mine @ up_theirs.T).addmm_(down_mine.T, down_theirs).div_(mine[:, None]).div_(theirs)
    active, activity = (F.normalize(units.activations, dim=0, eps=_TINY) for units in (one, other))
    signed.addmm_(active.T, activity)
    unsigned = (gate_mine @ gate_theirs.T).div_(mine[:, None]).div_(theirs)
    sign = torch.where(signed < 0, -1.0, 1.0)
    return unsigned.add_(signed.abs_()), sign


def cheapest(cost_FF: NDArray[Any], exact: int = EXACT) -> NDArray[np.int64]:
    """Return for each row the column of a one-to-one assignment of least total cost.

    Of more than ``exact`` rows the surest are paired first: those that are each other's cheapest, cheapest pairs
    first, which is what a greedy choice takes, until the rest can be assigned exactly. On units of nothing in
    common the total is 0.4 % above the least with half of them left, on noisy copies it is the least.

    >>> cheapest(np.array([[1.0, 2.0], [1.1, 4.0]]))
    array([1, 0])
    >>> cheapest(np.array([[1.0, 2.0], [1.1, 4.0]]), exact=1)
    array([0, 1])
    """
    from scipy.optimize import linear_sum_assignment  # a third of a second, which no other operation has need of

    count = len(cost_FF)
    order = np.empty(count, np.int64)
    rows, columns = np.arange(count), np.arange(count)
    while len(rows) > exact:
        left = cost_FF if len(rows) == count else cost_FF[np.ix_(rows, columns)]
        best = left.argmin(1)
        mutual = np.flatnonzero(left.argmin(0)[best] == np.arange(len(rows)))
        surest = mutual[left[mutual, best[mutual]].argsort(kind="stable")][: len(rows) - exact]
        order[rows[surest]] = columns[best[surest]]
        rows, columns = np.delete(rows, surest), np.delete(columns, best[surest])
    if len(rows):
        mine, theirs = linear_sum_assignment(cost_FF[np.ix_(rows, columns)])
        order[rows[mine]] = columns[theirs]
    return order
