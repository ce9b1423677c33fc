"""Texts that a model draws from itself: what it has seen, without anybody having to find it again.

Sampled at temperature 1 from its own beginning of a text, a model gives text of every kind in about the shares that it
was trained on (data-free distillation: Liu et al. 2023, arXiv:2305.17888; for calibration: Williams et al. 2024,
arXiv:2410.17170). So healing sees also what the calibration text leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel


@torch.no_grad()
def sampled(
    model: PreTrainedModel,
    beginning: Sequence[int],
    length: int,
    ends: Sequence[int],
    *,
    rows: int,
    temperature: float,
    seed: int,
) -> Iterator[list[list[int]]]:
    """Yield, without end, the tokens of ``rows`` texts of ``length`` tokens at most, after ``beginning``.

    Each is drawn from the whole distribution (no top-k, no nucleus: those would leave out what is rare, which is what
    is wanted) and ends before one of ``ends``. The same ``seed`` gives the same texts on the same machine.
    """
    # Not the checkpoint's own settings, which often cut the distribution.
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )
    start = torch.tensor([list(beginning)] * rows, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        state = _state(devices)
    while True:
        # Callers may draw between two batches; these do not change for that.
        with torch.random.fork_rng(devices):
            _restore(devices, state)
            made = model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings)
            state = _state(devices)
        yield [_before(row, ends) for row in made[:, start.shape[1] :].tolist()]


def _state(devices: Sequence[torch.device]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _restore(devices: Sequence[torch.device], state: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    for device, each in zip(devices, state[1:], strict=True):
        torch.cuda.set_rng_state(each, device)


def _before(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Cut at the first end.

    >>> _before([5, 1, 1, 1], [1, 2])
    [5]
    """
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]
