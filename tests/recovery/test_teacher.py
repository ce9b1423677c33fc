"""What a cache keeps of a teacher: its likeliest tokens one by one, the others as one, to the row of each token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moesurgeon.engine.batches import to_batch
from moesurgeon.engine.model import logits_of
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.errors import OutputError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.progress import SILENT
from moesurgeon.recovery import teacher_cache
from moesurgeon.recovery.objective import Losses, distillation
from moesurgeon.recovery.teacher import Likeliest
from moesurgeon.recovery.teacher_cache import Cached, fill_cache, is_cached
from moesurgeon.traces.windows import Corpus
from tests.engine.small import corpus_of, random_windows, running, saved, small_model, stream_of


def _logits(vocabulary: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(9, vocabulary, generator=random) for _ in range(2))
    return student, teacher


def _lumped(student: np.ndarray, teacher: np.ndarray, kept: int, temperature: float) -> float:
    """KL over the teacher's likeliest tokens and all others as one, in float64, token by token."""
    total = 0.0
    for mine, theirs in zip(student.astype(float), teacher.astype(float), strict=True):
        p, q = (np.exp(each / temperature) / np.exp(each / temperature).sum() for each in (mine, theirs))
        top = np.argsort(-q)[:kept]
        rest = np.setdiff1d(np.arange(len(q)), top)
        total += float((q[top] * np.log(q[top] / p[top])).sum())
        if len(rest):
            total += float(q[rest].sum() * np.log(q[rest].sum() / p[rest].sum()))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabulary", [65, 200])
def test_the_divergence_is_the_lumped_one_in_float64(vocabulary: int, temperature: float) -> None:
    student, teacher = _logits(vocabulary)
    found = Likeliest.of(teacher, temperature).divergence(student, temperature)
    assert found.item() == pytest.approx(_lumped(student.numpy(), teacher.numpy(), 64, temperature), rel=1e-5)
    whole = distillation(student[None], teacher[None], torch.ones(1, 9, dtype=torch.bool), temperature)
    assert 0 < float(found) <= float(whole) * (1 + 1e-6)  # the log-sum inequality


@pytest.mark.parametrize("vocabulary", [11, 64])
def test_with_a_small_vocabulary_it_is_the_whole_divergence_and_gradient(vocabulary: int) -> None:
    student, teacher = _logits(vocabulary)
    text = torch.ones(1, 9, dtype=torch.bool)
    one, other = (student.clone().requires_grad_() for _ in range(2))
    found = Likeliest.of(teacher, 2.0).divergence(one, 2.0)
    whole = distillation(other[None], teacher[None], text, 2.0)
    found.backward()
    whole.backward()
    assert found.item() == pytest.approx(whole.item(), rel=1e-5)
    assert one.grad is not None and other.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_lumped_divergence() -> None:
    """d/dz_j of KL: p_j - q_j for the kept, p_j - q_rest p_j / p_rest for the others."""
    student, teacher = _logits(80)
    leaf = student.clone().requires_grad_()
    Likeliest.of(teacher, 1.0).divergence(leaf, 1.0).backward()
    p, q = student.double().softmax(-1), teacher.double().softmax(-1)
    top = torch.zeros_like(q, dtype=torch.bool).scatter(-1, q.topk(64).indices, True)
    p_rest, q_rest = ((each * ~top).sum(-1, keepdim=True) for each in (p, q))
    expected = torch.where(top, p - q, p - q_rest * p / p_rest) / len(p)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-7)


def test_a_teacher_that_is_sure_leaves_no_nan() -> None:
    teacher = torch.full((3, 100), -1e4)
    teacher[:, 5] = 1e4
    leaf = torch.zeros(3, 100, requires_grad=True)
    loss = Likeliest.of(teacher, 1.0).divergence(leaf, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(100), rel=1e-5)
    assert leaf.grad is not None and leaf.grad.isfinite().all()


LOSSES = Losses(router=1.0, hidden=1.0, temperature=1.5)


def _filled(folder: Path) -> tuple[Subject, PreTrainedModel, Corpus]:
    subject = saved(small_model("deepseek_v3"), folder / "model")
    teacher = running(subject)
    corpus = corpus_of(random_windows("a", count=7, vocabulary=90), random_windows("b", count=4, vocabulary=90))
    stream = Stream(Source.of_model(teacher, subject.anatomy))
    fill_cache(
        folder / "cache", "digest", stream, corpus=corpus, heldout=corpus, losses=LOSSES, length=40, progress=SILENT,
    )  # fmt: skip
    return subject, teacher, corpus


def test_every_token_has_its_row(tmp_path: Path) -> None:
    subject, teacher, corpus = _filled(tmp_path)
    assert is_cached(tmp_path / "cache", "digest") and not is_cached(tmp_path / "cache", "other")
    cached = Cached(tmp_path / "cache", corpus, None)
    batch = to_batch([corpus.windows[number] for number in (9, 2, 5)], torch.device("cpu"))  # in any order
    said = cached.says(batch)
    logits = logits_of(teacher, batch.tokens, batch.mask)[batch.is_text]
    wanted = Likeliest.of(logits, 1.5)
    assert said.likeliest is not None
    assert torch.equal(said.likeliest.indices, wanted.indices)
    torch.testing.assert_close(said.likeliest.logq, wanted.logq, rtol=1e-4, atol=1e-5)
    assert [tuple(each.shape) for each in said.routers] == [(batch.text_tokens, 8)] * len(subject.anatomy.moe_layers)
    assert [tuple(each.shape) for each in said.hidden] == [(batch.text_tokens, 32)] * subject.anatomy.layers
    states = teacher(input_ids=batch.tokens, attention_mask=batch.mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(said.hidden[0], states[1][batch.is_text], rtol=1e-4, atol=1e-5)
    assert cached.counts.sum() == subject.anatomy.top_k * len(subject.anatomy.moe_layers) * sum(corpus.tokens.values())


def test_the_routers_are_those_of_the_experts_that_are_left(tmp_path: Path) -> None:
    _subject, _teacher, corpus = _filled(tmp_path)
    batch = to_batch(corpus.windows[:2], torch.device("cpu"))
    everyone = Cached(tmp_path / "cache", corpus, None).says(batch).routers
    some = Cached(tmp_path / "cache", corpus, {1: (6, 2), 2: (0, 1)}).says(batch).routers
    assert torch.equal(some[0], everyone[0][:, [6, 2]]) and torch.equal(some[1], everyone[1][:, [0, 1]])


def test_a_cache_of_more_text_serves_less(tmp_path: Path) -> None:
    _subject, _teacher, corpus = _filled(tmp_path)
    some = replace(corpus, windows=[corpus.windows[number] for number in (8, 3, 10)])
    other = random_windows("c", count=1, vocabulary=90)
    assert is_cached(tmp_path / "cache", "digest", some.windows)
    assert not is_cached(tmp_path / "cache", "digest", [*some.windows, *other])
    batch = to_batch(some.windows[1:], torch.device("cpu"))
    mine, theirs = (Cached(tmp_path / "cache", each, None).says(batch) for each in (some, corpus))
    assert mine.likeliest is not None and theirs.likeliest is not None
    assert torch.equal(mine.likeliest.logq, theirs.likeliest.logq)
    assert len(mine.likeliest.logq) == batch.text_tokens


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_cache_is_whole_or_not_there(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_given: object, **_named: object) -> None:
        raise error

    monkeypatch.setattr(teacher_cache, "write_said", fails)
    with pytest.raises((OutputError, KeyboardInterrupt)) as raised:
        _filled_in(tmp_path / "deep")
    if isinstance(error, OSError):
        assert "free space, or name another place with --cache" in str(raised.value)
    assert not (tmp_path / "deep").exists()


def _filled_in(folder: Path) -> None:
    subject = saved(small_model("mixtral", num_hidden_layers=1), folder.with_name("model"))
    corpus = corpus_of(random_windows("a", count=2, vocabulary=90))
    fill_cache(
        folder / "cache", "digest", stream_of(subject), corpus=corpus, heldout=corpus, losses=Losses(),
        length=40, progress=SILENT,
    )  # fmt: skip
