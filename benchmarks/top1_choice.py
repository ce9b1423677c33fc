"""What a router could win at top-1: the expert that it takes, next to the best one, an oracle that sees the target.

    python benchmarks/top1_choice.py [CHECKPOINT ...] [--teacher builtin:tiny-mixtral]

For each layer of checkpoints with the teacher's experts, healed or not, on inputs of the teacher's blocks: the error of
one expert's output, at weight one, against the teacher's block, relative to that. Of the expert that the router takes,
of the best of all, and of what a linear router takes that was fitted to these errors on other tokens (Adam on their
mean under its softmax, no straight-through). For gates that renormalise, with no shared experts.

Prints a table in Markdown and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as `python benchmarks/top1_choice.py`

from benchmarks.quality_cuts import RUNNING  # noqa: E402 - after its path
from benchmarks.quality_report import markdown  # noqa: E402
from moesurgeon.engine.batches import batches_of, rows_for  # noqa: E402
from moesurgeon.engine.device import place  # noqa: E402
from moesurgeon.engine.model import MoeBlock, moe_blocks  # noqa: E402
from moesurgeon.engine.whole import load_model  # noqa: E402
from moesurgeon.pipeline.options import Text  # noqa: E402
from moesurgeon.pipeline.subject import Subject, open_subject  # noqa: E402
from moesurgeon.pipeline.text import read_text, window_length  # noqa: E402

Passed = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""By layer what went into its block and came out, of the tokens of text [N, H]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=[], metavar="CHECKPOINT")
    parser.add_argument("--teacher", default="builtin:tiny-mixtral")
    parser.add_argument("--tokens", type=int, default=24576, help="of the calibration split, to fit on")
    parser.add_argument("--heldout-tokens", type=int, default=12288, help="of the validation split, to measure on")
    parser.add_argument("--steps", type=int, default=400, help="of the fit")
    given = parser.parse_args()
    torch.set_num_threads(1)
    subject, teacher = opened(given.teacher)
    if not subject.anatomy.renormalises or subject.anatomy.shared_experts:
        raise SystemExit(f"{given.teacher} weighs a single expert otherwise than with one, or has shared ones")
    text = {"calibration": given.tokens, "validation": given.heldout_tokens}
    seen, heldout = (passed(subject, teacher, split, tokens) for split, tokens in text.items())
    rows = []
    for name in given.checkpoints or [given.teacher]:
        for block in moe_blocks(opened(name)[1], subject.anatomy):
            rows.append({"checkpoint": name, "layer": block.layer, **choices(block, seen, heldout, given.steps)})
    cells = [
        [row["checkpoint"], str(row["layer"]), *(f"{row[key]:.1%}" for key in ("router", "oracle", "agree", "fitted"))]
        for row in rows
    ]
    print(markdown(["", "layer", "router's choice", "oracle", "tokens where both agree", "fitted router"], cells))
    print(json.dumps({"options": vars(given), "rows": rows}))


def opened(name: str) -> tuple[Subject, Any]:
    subject = open_subject(name)
    placement = place(RUNNING.device, RUNNING.dtype, subject.stored_dtype)
    return subject, load_model(subject.checkpoint, subject.anatomy, placement)


@torch.no_grad()
def passed(subject: Subject, model: Any, split: str, tokens: int) -> Passed:
    corpus = read_text(subject, Text(max_tokens=tokens, split=split), builtin_split="calibration")  # type: ignore[arg-type]
    found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    last: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for block in moe_blocks(model, subject.anatomy):
        block.module.register_forward_hook(
            lambda _module, inputs, output, layer=block.layer: last.update(
                {layer: (inputs[0], output[0] if isinstance(output, tuple) else output)}
            )
        )
    for batch in batches_of(corpus, rows=rows_for(window_length(subject, Text())), device=model.device):
        model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        for layer, states in last.items():
            x, y = (state.reshape(*batch.tokens.shape, -1)[batch.is_text] for state in states)
            found.setdefault(layer, []).append((x, y))
    return {layer: tuple(map(torch.cat, zip(*parts, strict=True))) for layer, parts in found.items()}  # type: ignore[misc]


def choices(block: MoeBlock, seen: Passed, heldout: Passed, steps: int) -> dict[str, float]:
    """Return errors of what is chosen, as the description of this file has them."""
    router: torch.Tensor = block.router.weight.detach()  # type: ignore[union-attr,assignment]
    x, y = heldout[block.layer]
    error_NE = errors(block, x, y)
    size = float(y.square().sum())
    chosen, best = (x @ router.T).argmax(-1), error_NE.argmin(-1)

    def of(expert_N: torch.Tensor) -> float:
        return float(error_NE.gather(1, expert_N[:, None]).sum()) / size

    fitted = fit(router, seen[block.layer][0], errors(block, *seen[block.layer]), steps)
    return {
        "router": of(chosen),
        "oracle": of(best),
        "agree": float((chosen == best).float().mean()),
        "fitted": of((x @ fitted.T).argmax(-1)),
    }


@torch.no_grad()
def errors(block: MoeBlock, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return |y - f_e(x)|^2 of every expert [N, E]."""
    experts: Any = block.experts
    found = []
    for both, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = (x @ both.T).chunk(2, dim=-1)
        found.append((y - (F.silu(gate) * up) @ down.T).square().sum(-1))
    return torch.stack(found, dim=-1)


def fit(router: torch.Tensor, x: torch.Tensor, error_NE: torch.Tensor, steps: int) -> torch.Tensor:
    """Return a router under whose softmax the mean error is small."""
    weight = router.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=3e-3)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (4096,), generator=random)
        loss = ((x[rows] @ weight.T).softmax(-1) * error_NE[rows]).sum(-1).mean() / error_NE.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach()


if __name__ == "__main__":
    main()
