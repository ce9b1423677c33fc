"""The lm-evaluation-harness on the walk: the same answers as a plain forward pass, and as lm-eval's own model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

pytest.importorskip("lm_eval", reason="needs the extra harness: pip install 'moesurgeon[harness]'")

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.scratch import Scratch
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.errors import UsageError
from moesurgeon.evaluation import harness
from moesurgeon.evaluation.harness import Reading, WalkingModel
from moesurgeon.pipeline.decoding import whole
from moesurgeon.pipeline.subject import Subject
from moesurgeon.progress import SILENT
from tests.engine.small import running, source_of

PAIRS = [
    ("The quick brown fox", " jumps over the lazy dog"),
    ("1 + 1 = ", "2"),
    ("", "a text from its beginning"),
    ("Question: which one? Answer:", " A"),
    ("Question: which one? Answer:", " B"),
    ("Question: which one? Answer:", " B"),
    ("def f(x):\n    return", " x"),
    ("word " * 600, "and so on"),
    ("x", "y"),
]


@dataclass(frozen=True)
class Asked:
    args: tuple[Any, ...]


def _walking(subject: Subject, source: Source, context: int = 512, ends: Sequence[int] = (1,)) -> WalkingModel:
    tokenizer = AutoTokenizer.from_pretrained(subject.root)

    def fit(batches: harness.Batches) -> AbstractContextManager[tuple[Sequence[Batch], None]]:
        return nullcontext((batches(source.scratch.tokens), None))

    @contextmanager
    def resident() -> Iterator[PreTrainedModel]:
        with whole(source) as model:
            yield model

    return WalkingModel(Stream(source), Reading(tokenizer, context, ends), fit, resident, SILENT)


@pytest.fixture(scope="module")
def model(tiny_mixtral: Subject) -> WalkingModel:
    return _walking(tiny_mixtral, source_of(tiny_mixtral))


@pytest.fixture(scope="module")
def stock(tiny_mixtral: Subject) -> Any:
    """The harness's own model on the same weights."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_mixtral.root)
    return HFLM(pretrained=running(tiny_mixtral), tokenizer=tokenizer, max_length=512, batch_size=3, device="cpu")


def _asked(arguments: Sequence[tuple[Any, ...]]) -> list[Asked]:
    return [Asked(each) for each in arguments]


def test_log_likelihoods_are_those_of_a_plain_forward_pass(model: WalkingModel, tiny_mixtral: Subject) -> None:
    plain = running(tiny_mixtral)
    for (context, continuation), (logprob, is_greedy) in zip(PAIRS, model.loglikelihood(_asked(PAIRS)), strict=True):
        kept = context.rstrip()
        if kept:
            before, tokens = model.tok_encode(kept), model.tok_encode(context + continuation)
        else:  # the text then begins with what begins every text
            before, tokens = [0], [0, *model.tok_encode(continuation, add_special_tokens=False)]
        count = len(tokens) - len(before)
        tokens = torch.tensor([tokens[-513:]])
        with torch.no_grad():
            logp = plain(input_ids=tokens[:, :-1]).logits[0].log_softmax(-1)[-count:]
        wanted = tokens[0, -count:]
        assert logprob == pytest.approx(float(logp.gather(-1, wanted[:, None]).sum()), abs=1e-3)
        assert is_greedy == bool((logp.argmax(-1) == wanted).all())


def test_log_likelihoods_are_those_of_the_harness(model: WalkingModel, stock: Any) -> None:
    mine, theirs = (one.loglikelihood(_asked(PAIRS), disable_tqdm=True) for one in (model, stock))
    assert [logprob for logprob, _ in mine] == pytest.approx([logprob for logprob, _ in theirs], abs=1e-3)
    assert [is_greedy for _, is_greedy in mine] == [is_greedy for _, is_greedy in theirs]
    assert mine[4] == mine[5]


def test_rolling_log_likelihoods_are_those_of_the_harness(model: WalkingModel, stock: Any) -> None:
    texts = [("A short text.",), ("words " * 700,), ("",), ("def f():\n    pass\n" * 40,)]
    mine, theirs = (one.loglikelihood_rolling(_asked(texts), disable_tqdm=True) for one in (model, stock))
    assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-3)


def test_generated_texts_are_those_of_the_harness(model: WalkingModel, stock: Any) -> None:
    settings = ({"until": ["\n"], "max_gen_toks": 24}, {"until": ["zzz"], "max_gen_toks": 9, "do_sample": False})
    prompts = ["def __init__(self", "import os\nimport", "The meaning of", '{"name": "a", "value":', "12 + 7 ="]
    requests = _asked([(prompt, setting) for prompt in prompts for setting in settings])
    assert model.generate_until(requests) == [stock.generate_until([each], disable_tqdm=True)[0] for each in requests]
    # And the walk still has the weights that it began with.
    assert model.loglikelihood(_asked(PAIRS[:1]))[0][0] == pytest.approx(
        stock.loglikelihood(_asked(PAIRS[:1]), disable_tqdm=True)[0][0], abs=1e-3
    )


@pytest.mark.parametrize(("tokens", "positions"), [(8192, 1), (64, 7), (1, 2048)])
def test_neither_batches_nor_blocks_nor_memory_matter(
    tokens: int, positions: int, tiny_mixtral: Subject, model: WalkingModel
) -> None:
    expected = model.loglikelihood(_asked(PAIRS))
    source = source_of(tiny_mixtral)
    source.supply.allow(source.supply.least)
    assert not source.supply.plan.is_resident
    source.scratch = Scratch(tokens, positions)
    again = _walking(tiny_mixtral, source).loglikelihood(_asked(PAIRS))
    assert [logprob for logprob, _ in again] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)


def test_nothing_asked(model: WalkingModel) -> None:
    assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []


def test_what_is_refused(model: WalkingModel, tiny_mixtral: Subject) -> None:
    with pytest.raises(UsageError, match="only greedy ones"):
        model.generate_until(_asked([("a", {"do_sample": True, "temperature": 0.8})]))
    with pytest.raises(UsageError, match="512 new tokens, and the checkpoint's context is 512"):
        model.generate_until(_asked([("a", {"max_gen_toks": 512})]))
    short = _walking(tiny_mixtral, source_of(tiny_mixtral), context=8)
    with pytest.raises(UsageError, match="longer than the checkpoint's context of 8"):
        short.loglikelihood(_asked([("a", " long answer" * 9)]))
