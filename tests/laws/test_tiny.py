"""The builtin checkpoints are good enough that surgery on them shows something."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesurgeon.pipeline.evaluate import evaluate
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.text import read_text
from moesurgeon.profiling.artefact import load_profile
from moesurgeon.profiling.statistics import shares
from moesurgeon.surgery.retop import RetopSpec

TEXT = Text(max_tokens=18432)


def test_they_are_small_and_in_the_hubs_layout(tiny: Subject) -> None:
    assert {tensor.dtype for tensor in tiny.checkpoint.tensors.values()} == {"BF16"}
    assert len(tiny.checkpoint.headers) > 1
    assert tiny.anatomy.layout.name == "per-expert"
    assert (tiny.root / "tokenizer.json").is_file()


def test_together_they_have_at_most_12_megabytes(tiny_mixtral: Subject, tiny_deepseek: Subject) -> None:
    files = [path for subject in (tiny_mixtral, tiny_deepseek) for path in subject.root.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_they_know_more_than_token_frequencies(tiny: Subject) -> None:
    """At least 1.5 nats per token better than a unigram model on text that neither saw."""
    train = read_text(tiny, Text(max_tokens=400_000, split="train"), builtin_split="train")
    report = read_text(tiny, TEXT, builtin_split="report")
    counts = np.ones(int(tiny.checkpoint.config["vocab_size"]))
    for window in train.windows:
        np.add.at(counts, window.tokens, 1)
    unigram = -np.log(counts / counts.sum())
    # The first token of a window is not predicted.
    baseline = float(np.concatenate([unigram[window.tokens[1:]] for window in report.windows]).mean())
    assert evaluate(tiny.name, None, TEXT, Running())["loss"] <= baseline - 1.5


def test_domains_use_different_experts(tiny: Subject, out: Path) -> None:
    """Averaged over layers, two domains differ in at least a fifth of their traffic."""
    profile(tiny.name, ProfileOutput(output=out), TEXT, Running())
    statistics = load_profile(out).statistics
    share = shares(statistics.by_domain("tokens"))  # [D, L, E]
    one, other = (statistics.domains.index(domain) for domain in ("prose", "arithmetic"))
    assert 0.5 * np.abs(share[one] - share[other]).sum(axis=-1).mean() >= 0.2


def test_naive_top_1_costs_something(tiny: Subject, out: Path) -> None:
    """Even the lower end of the interval of the perplexity ratio is clearly above one."""
    retop(tiny.name, RetopSpec(top_k=1), Writing(output=out, link=True))
    report = evaluate(str(out), tiny.name, TEXT, Running())
    assert report["against"]["interval"][0] > 1.02


def test_their_cards_say_how_they_were_trained(tiny: Subject) -> None:
    card = (tiny.root / "README.md").read_text()
    for said in ("seed", "standard library", "unigram", "recipes/tiny/train.py", "Final training loss"):
        assert said in card
