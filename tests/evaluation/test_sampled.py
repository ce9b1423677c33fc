"""Text that a model draws from itself: by its own distribution, and the same for the same seed."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch

from moesurgeon.evaluation.sampled import sampled
from moesurgeon.pipeline.options import SampleSpec
from moesurgeon.pipeline.sample import uniform
from tests.engine.small import small_model


def drawn(model, count: int, ends=(), *, length: int, rows: int, seed: int = 0, temperature: float = 1.0):  # type: ignore[no-untyped-def]
    return list(islice(sampled(model, [3], length, ends, rows=rows, temperature=temperature, seed=seed), count))


def test_tokens_are_drawn_from_the_whole_distribution() -> None:
    model = small_model("mixtral").eval()
    model.generation_config.top_k = 1  # the checkpoint's own wish, which would give one token alone
    for temperature in (1.0, 0.5):
        with torch.no_grad():
            logits = model(torch.tensor([[3]])).logits[0, -1].double() * 3
            model.lm_head.weight.data *= 3
            expected = torch.softmax(logits / temperature, -1).numpy()
            rows = drawn(model, 4, length=1, rows=4000, temperature=temperature)
            model.lm_head.weight.data /= 3
        counts = np.bincount([token for batch in rows for (token,) in batch], minlength=len(expected))
        assert expected.max() < 0.9 and (expected * 16000 > 5).sum() > 5  # neither certain nor flat
        # Six standard deviations of each token's count.
        assert (np.abs(counts - 16000 * expected) <= 6 * np.sqrt(16000 * expected) + 3).all()


def test_a_seed_is_all_that_counts() -> None:
    model = small_model("mixtral").eval()
    torch.manual_seed(1)
    texts = drawn(model, 2, length=6, rows=3, seed=5)
    before = torch.get_rng_state()
    source = sampled(model, [3], 6, (), rows=3, temperature=1.0, seed=5)
    again = [next(source)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)  # what others draw meanwhile
    again.append(next(source))
    assert texts == again and texts[0] != texts[1]
    assert drawn(model, 2, length=6, rows=3, seed=6) != texts


def test_texts_end_before_what_ends_them() -> None:
    model = small_model("mixtral").eval()
    free = drawn(model, 1, length=12, rows=16)[0]
    ends = [free[0][5], free[1][3]]
    ended = drawn(model, 1, ends, length=12, rows=16)[0]
    assert not any(token in ends for text in ended for token in text)
    assert len(ended[0]) <= 5 and len(ended[1]) <= 3 and ended[0] == free[0][: len(ended[0])]


def test_uniform_tokens_are_uniform() -> None:
    spec = SampleSpec(rows=100, length=1000, seed=1)
    (rows,) = islice(uniform(50, spec), 1)
    counts = np.bincount(np.concatenate(rows), minlength=50)
    assert len(counts) == 50 and np.abs(counts - 2000).max() < 6 * np.sqrt(2000)
    assert next(uniform(50, spec)) == rows
