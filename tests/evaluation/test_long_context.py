"""Windows of many thousand tokens: every position is measured, and none of it costs a whole batch of logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from moesurgeon.pipeline.evaluate import evaluate
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.subject import open_subject
from tests.engine.small import VOCABULARY, running, saved, small_model

CONTEXT, LENGTH = 32768, 16384


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A random model with a long context, another one, and a text of one long and two short documents."""
    folder = tmp_path_factory.mktemp("long")
    for number in (0, 1):
        where = folder / str(number)
        saved(small_model("mixtral", seed=number, max_position_embeddings=CONTEXT, num_hidden_layers=2), where)
        tokenizer = Tokenizer(WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(where / "tokenizer.json"))
    random = np.random.default_rng(0)
    trace = folder / "text.jsonl"
    documents = [" ".join(f"w{token}" for token in random.integers(0, VOCABULARY, size)) for size in (LENGTH, 20, 300)]
    trace.write_text("".join(f'{{"text": "{document}"}}\n' for document in documents))
    return folder / "0", folder / "1", trace


def test_windows_of_16384_tokens(long_text: tuple[Path, Path, Path]) -> None:
    model, other, trace = long_text
    text = Text(traces=(f"long={trace}",), max_tokens=None, length=LENGTH)
    report = evaluate(str(model), str(other), text, Running(device="cpu"))
    buckets = ["0-127", "128-255", *(f"{1 << power}-{(2 << power) - 1}" for power in range(8, 14))]
    assert list(report["lengths"]) == buckets
    assert [part["documents"] for part in report["lengths"].values()] == [3, 2, 2, 1, 1, 1, 1, 1]
    assert report["lengths"]["8192-16383"]["tokens"] == 8191
    assert sum(part["tokens"] for part in report["lengths"].values()) == report["tokens"] == LENGTH + 320 - 3

    # The same from a plain forward pass of each over the long document.
    tokens = torch.tensor([[int(word[1:]) for word in trace.read_text().split('"')[3].split()]])
    losses = []
    for checkpoint in (model, other):
        with torch.no_grad():
            logits = running(open_subject(str(checkpoint)))(input_ids=tokens).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none").double().numpy())
    for low, high in ((2048, 4096), (4096, 8192), (8192, 16384)):
        part = report["lengths"][f"{low}-{high - 1}"]
        mine, theirs = (loss[low:high].mean() for loss in losses)
        assert part["loss"] == pytest.approx(mine, rel=1e-5)
        assert part["perplexity_ratio"] == pytest.approx(np.exp(mine - theirs), rel=1e-4)
