"""Greedy continuations of prompts, by a model that has all its weights in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from moesurgeon.engine.ranks import Ranks
from moesurgeon.evaluation.degeneration import Continuation
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.windows import Window

Tokens = NDArray[np.int64]
PROMPT_TOKENS = 64
"""Tokens of a prompt at most: enough to say what kind of text it is."""
ROWS = 16
"""Prompts that are continued together."""
_NOTHING = -1  # in place of a token


def prompts_of(windows: Sequence[Window], domains: Sequence[str], count: int) -> list[Window]:
    """Return the beginnings of ``count`` windows: as many of each domain, and of as many documents as can be.

    A prompt is a window's first 64 tokens, or its first half if that is shorter. Documents are taken evenly
    from all of a domain, so that the same text gives the same prompts. Fewer than ``count`` come where there
    are fewer windows.
    """
    chosen = []
    for number, domain in enumerate(domains):
        share = (count + len(domains) - 1 - number) // len(domains)
        mine = [window for window in windows if window.domain == domain]
        chosen += _spread(mine, share)
    return [
        Window(each.domain, each.document, each.start, each.tokens[: min(PROMPT_TOKENS, len(each.tokens) // 2)])
        for each in chosen
    ]


def _spread(windows: Sequence[Window], count: int) -> list[Window]:
    """Take ``count`` of ``windows``: one of each document first, evenly spaced, then the next of each."""
    rounds: dict[int, list[Window]] = {}
    seen: dict[int, int] = {}
    for window in windows:
        turn = seen[window.document] = seen.get(window.document, 0) + 1
        rounds.setdefault(turn, []).append(window)
    taken: list[Window] = []
    for turn in sorted(rounds):
        left = count - len(taken)
        of_turn = rounds[turn]
        if left < len(of_turn):
            of_turn = [of_turn[place * len(of_turn) // left] for place in range(left)]
        taken += of_turn
    return taken


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Window],
    new_tokens: int,
    ends: Sequence[int],
    *,
    ranks: Ranks,
    progress: Progress = SILENT,
) -> list[Continuation]:
    """Return what ``model`` makes of each of ``prompts``; of several ``ranks`` each decodes some of them."""
    groups = list(same_lengths([prompt.tokens for prompt in prompts]))
    mine = [groups[number] for number in ranks.mine(len(groups))]
    tokens = np.full((len(mine), ROWS, new_tokens), float(_NOTHING))
    with progress.task("continuing", sum(map(len, mine)), "texts") as advance:
        for place, numbers in enumerate(mine):
            rows = np.stack([prompts[number].tokens for number in numbers]).astype(np.int64)
            for row, made in enumerate(decoded(model, rows, new_tokens, ends)):
                tokens[place, row, : len(made)] = made
            advance(len(numbers))
    tokens = ranks.gathered(tokens, len(groups))
    found = {
        number: _continuation(prompts[number].domain, tokens[place, row], ends)
        for place, numbers in enumerate(groups)
        for row, number in enumerate(numbers)
    }
    return [found[number] for number in range(len(prompts))]


def _continuation(domain: str, made: NDArray[np.float64], ends: Sequence[int]) -> Continuation:
    tokens = [int(token) for token in made if token != _NOTHING]
    stopped = bool(tokens) and tokens[-1] in ends
    return Continuation(domain, tokens[:-1] if stopped else tokens, stopped)


def same_lengths(prompts: Sequence[Sized]) -> Iterator[list[int]]:
    """Yield the numbers of prompts that are decoded together: of one length, so that none has to be padded."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for _, group in groupby(order, key=lambda number: len(prompts[number])):
        numbers = list(group)
        yield from (numbers[start : start + ROWS] for start in range(0, len(numbers), ROWS))


@torch.no_grad()
def decoded(
    model: PreTrainedModel,
    prompts: Tokens,
    new_tokens: int,
    ends: Sequence[int],
    criteria: StoppingCriteriaList | None = None,
) -> list[list[int]]:
    """Return the likeliest next token after the other for ``prompts`` [B, T], each up to one of ``ends`` with it.

    ``criteria``: further reasons to end, in the form of transformers.
    """
    tokens = torch.from_numpy(prompts).to(model.device)
    # Not the checkpoint's own settings: what samples or penalises repetition would hide what is measured here.
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )
    given: Any = {"stopping_criteria": criteria} if criteria else {}
    result: torch.Tensor = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=settings, **given
    )
    return [_up_to(row, ends) for row in result[:, tokens.shape[1] :].tolist()]


def _up_to(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Cut what was padded behind the first end.

    >>> _up_to([5, 1, 1, 1], [1, 2])
    [5, 1]
    """
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]
