"""The lm-evaluation-harness on top of the walk: its requests as rows of batches, its texts decoded greedily.

Needs the extra ``harness`` (lm-eval). Tokens, truncation and sums are those of lm-eval's own ``hf`` model, so
that results can be compared with published ones.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

from moesurgeon.engine.batches import Batch, rows_for, to_batch
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Tail, Walk
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.evaluation.continuations import decoded, same_lengths
from moesurgeon.progress import Progress
from moesurgeon.traces.windows import Window

_NEW_TOKENS = 256  # where a task does not say, as lm-eval

Request = tuple[Any, list[int], list[int]]
"""What was asked (for lm-eval's cache), the tokens of the context, those of the continuation."""
Batches = Callable[[int], Sequence[Batch]]
"""By how many tokens a batch may have."""
Fit = Callable[[Batches], AbstractContextManager[tuple[Sequence[Batch], Path | None]]]
"""Makes room for batches; its context has those that fit and the folder for hidden states (None: memory)."""

Resident = Callable[[], AbstractContextManager[PreTrainedModel]]
"""The whole model in memory, as long as its context; raises where it is not to be had."""


@dataclass(frozen=True)
class Reading:
    """How a checkpoint reads text: ``context`` is the longest input in tokens, ``ends`` what ends a text."""

    tokenizer: Any
    context: int
    ends: Sequence[int]


class WalkingModel(TemplateLM):
    """A stream as lm-eval wants a model."""

    def __init__(self, stream: Stream, reading: Reading, fit: Fit, resident: Resident, progress: Progress) -> None:
        super().__init__()
        self._device = stream.source.placement.device
        self.tokenizer = reading.tokenizer
        self.is_at_work = False
        self._stream = stream
        self._reading = reading
        self._fit = fit
        self._resident = resident
        self._progress = progress
        self._terminal = sys.stderr  # lm-eval's own bars are kept off it

    @property
    def eot_token_id(self) -> int:
        token: int | None = self.tokenizer.eos_token_id
        if token is None and self._reading.ends:
            return self._reading.ends[0]
        if token is None:
            raise CheckpointError(
                "neither tokenizer nor config.json names an eos token, which tasks need; "
                "copy generation_config.json and tokenizer_config.json from the original checkpoint"
            )
        return token

    @property
    def prefix_token_id(self) -> int:
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_ignored: Any) -> list[int]:
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            settings = {"add_special_tokens": False}
        tokens: list[int] = self.tokenizer.encode(string, verbose=False, **settings)
        return tokens

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        windows: list[Request] = []
        owner = []
        for number, (text,) in enumerate(request.args for request in requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._reading.context,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += logprob
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_ignored: Any) -> list[tuple[float, bool]]:
        """Return (log-probability, whether it is what greedy decoding gives) of every continuation."""
        with self._working():
            # What differs in the last token alone, as answers A to D, is one input with several questions.
            questions: dict[tuple[int, ...], list[int]] = {}
            for number, (_, context, continuation) in enumerate(requests):
                self._refuse_too_long(continuation)
                whole = (*context, *continuation)[-(self._reading.context + 1) : -1]
                questions.setdefault(whole, []).append(number)
            inputs = sorted(questions, key=lambda tokens: -len(tokens))
            answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
            if not inputs:
                return answers
            row = 0

            def batched(tokens: int) -> Sequence[Batch]:
                return [
                    to_batch([Window("harness", 0, 0, np.array(row, dtype=np.int32)) for row in rows], self.device)
                    for rows in _by_tokens(inputs, tokens)
                ]

            with self._fit(batched) as (batches, folder):
                walk = Walk([self._stream], batches, folder)
                total = sum(batch.text_tokens for batch in batches)
                with self._progress.task("harness", total, "tokens") as advance:
                    walk.through(advance=advance)
                for tail in walk.tail():
                    for number, batch in enumerate(batches):
                        asked = [
                            [(each, requests[each][2]) for each in questions[inputs[row + place]]]
                            for place in range(len(batch.windows))
                        ]
                        row += len(batch.windows)
                        for each, answer in _answers(tail, self._stream, number, batch, asked):
                            answers[each] = answer
        if not np.isfinite([logprob for logprob, _ in answers]).all():
            raise CheckpointError("the weights hold NaN or infinities, or overflow in this --dtype; try float32")
        return answers

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        with self._working(), self._resident() as model:
            texts = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                groups.setdefault(repr(request.args[1]), []).append(number)
            end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
            with self._progress.task("harness", len(requests), "texts") as advance:
                for numbers in groups.values():
                    settings: Any = normalize_gen_kwargs(requests[numbers[0]].args[1], _NEW_TOKENS)
                    until = handle_stop_sequences(settings.get("until"), eos=end)
                    new_tokens = settings["max_gen_toks"]
                    self._refuse(settings["do_sample"], new_tokens)
                    room = self._reading.context - new_tokens
                    prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
                    for rows in same_lengths(prompts):
                        tokens = np.array([prompts[row] for row in rows], dtype=np.int64)
                        stop = stop_sequences_criteria(self.tokenizer, until, tokens.shape[1], len(rows))
                        for row, made in zip(
                            rows, decoded(model, tokens, new_tokens, self._reading.ends, stop), strict=True
                        ):
                            text = self.tokenizer.decode(made, skip_special_tokens=False)
                            texts[numbers[row]] = postprocess_generated_text(text, until, None)
                            advance(1)
        return texts

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Say that what goes wrong now is not the task's fault, and let our own progress be seen."""
        self.is_at_work = True
        with redirect_stderr(self._terminal):
            yield
        self.is_at_work = False

    def _refuse_too_long(self, continuation: Sequence[int]) -> None:
        if len(continuation) > self._reading.context:
            raise UsageError(
                f"an answer of {len(continuation)} tokens is longer than the checkpoint's context of "
                f"{self._reading.context}; leave this task out"
            )

    def _refuse(self, samples: bool, new_tokens: int) -> None:
        if samples:
            raise UsageError("a task wants sampled texts (do_sample), and only greedy ones are made; change its YAML")
        if new_tokens >= self._reading.context:
            raise UsageError(
                f"a task wants {new_tokens} new tokens, and the checkpoint's context is {self._reading.context}; "
                "set max_gen_toks in its generation_kwargs"
            )


def _by_tokens(inputs: Sequence[tuple[int, ...]], tokens: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """Divide inputs, longest first, into batches of about ``tokens`` tokens each."""
    start = 0
    while start < len(inputs):
        stop = start + rows_for(len(inputs[start]), tokens)
        yield inputs[start:stop]
        start = stop


@torch.no_grad()
def _answers(
    tail: Tail, stream: Stream, number: int, batch: Batch, asked: Sequence[Sequence[tuple[int, Sequence[int]]]]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Yield the answer to each question that was ``asked`` of the rows, from logits a block of positions at a time."""
    length = batch.tokens.shape[1]
    rows = [
        (each, place, len(window.tokens), continuation)
        for place, (window, questions) in enumerate(zip(batch.windows, asked, strict=True))
        for each, continuation in questions
    ]
    logprobs = dict.fromkeys((each for each, *_ in rows), 0.0)
    greedy = dict.fromkeys(logprobs, True)
    # Only positions that are asked for need logits: those from the first token of a continuation on.
    first = min(size - len(continuation) for _, _, size, continuation in rows)
    step = max(1, stream.source.scratch.positions // len(batch.windows))
    for start in range(first, length, step):
        stop = min(start + step, length)
        logp = tail.logits(stream, number, start, stop).float().log_softmax(-1)
        best = logp.argmax(-1).cpu()
        for each, place, size, continuation in rows:
            low, high = max(start, size - len(continuation)), min(stop, size)
            if low >= high:
                continue
            wanted = torch.tensor(continuation[low - size + len(continuation) :][: high - low])
            chosen = logp[place, low - start : high - start].gather(-1, wanted[:, None].to(logp.device))
            logprobs[each] += float(chosen.double().sum())
            greedy[each] &= bool((best[place, low - start : high - start] == wanted).all())
    for each, logprob in logprobs.items():
        yield each, (logprob, greedy[each])
