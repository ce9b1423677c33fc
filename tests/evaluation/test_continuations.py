"""Greedy continuations: of which prompts, and that they are those of stock ``generate``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from moesurgeon.engine.ranks import Ranks
from moesurgeon.evaluation.continuations import continuations, decoded, prompts_of, same_lengths
from moesurgeon.pipeline.decoding import ends_of
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.traces.windows import Window
from tests.engine.small import VOCABULARY, random_windows, running, saved, small_model


def _windows(domain: str, *documents: list[int]) -> list[Window]:
    """Windows by document, of these lengths."""
    return [
        Window(domain, number, place * 1000, np.arange(length, dtype=np.int32))
        for number, lengths in enumerate(documents)
        for place, length in enumerate(lengths)
    ]


def test_prompts_are_of_all_domains_and_documents() -> None:
    windows = _windows("a", *[[200, 200]] * 10) + _windows("b", [20, 30], [9])
    prompts = prompts_of(windows, ["a", "b"], 7)
    assert [(each.domain, each.document, each.start) for each in prompts] == [
        ("a", 0, 0), ("a", 2, 0), ("a", 5, 0), ("a", 7, 0), ("b", 0, 0), ("b", 1, 0), ("b", 0, 1000),
    ]  # fmt: skip
    assert [len(each.tokens) for each in prompts] == [64, 64, 64, 64, 10, 4, 15]
    assert np.array_equal(prompts[0].tokens, windows[0].tokens[:64])


def test_prompts_are_as_many_as_there_are() -> None:
    windows = _windows("a", [8], [8]) + _windows("b", *[[128]] * 5)
    assert [each.domain for each in prompts_of(windows, ["a", "b"], 8)] == ["a", "a", "b", "b", "b", "b"]
    assert [each.domain for each in prompts_of(windows, ["a", "b"], 1)] == ["a"]
    assert len(prompts_of(windows, ["a", "b"], 100)) == 7


def test_prompts_of_one_length_come_together() -> None:
    groups = list(same_lengths([[0] * size for size in [5, 3, 5, 3, 5, *[4] * 20]]))
    assert sorted(number for group in groups for number in group) == list(range(25))
    assert [len(group) for group in groups] == [3, 16, 4, 2]
    assert groups[0] == [0, 2, 4]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v1", "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_decoding_is_that_of_stock_generate(family: str, tmp_path: Path) -> None:
    subject = saved(small_model(family), tmp_path)
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (5, 12))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    given = torch.from_numpy(prompts)
    free = stock.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=20,
                          eos_token_id=None, pad_token_id=0)[:, 12:].tolist()  # fmt: skip
    model = running(subject)
    assert decoded(model, prompts, 20, []) == free
    # Two of the tokens that come are declared to end a text.
    ends = [free[0][7], free[1][3]]
    settings = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=ends, pad_token_id=ends[0])
    ended = stock.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)[:, 12:].tolist()
    mine = decoded(model, prompts, 20, ends)
    for row, expected, whole in zip(mine, ended, free, strict=True):
        assert row == expected[: len(row)] == whole[: len(row)]
        assert len(row) == next((place + 1 for place, token in enumerate(whole) if token in ends), 20)


def test_what_the_checkpoint_would_rather_do_is_left_aside(tmp_path: Path) -> None:
    """Sampling and penalties of repetition would hide what is measured."""
    model = running(saved(small_model("mixtral"), tmp_path))
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (3, 8))
    plain = decoded(model, prompts, 16, [])
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, min_length=30)
    assert decoded(model, prompts, 16, []) == plain


def test_continuations_are_without_their_end_and_in_order(tmp_path: Path) -> None:
    model = running(saved(small_model("mixtral"), tmp_path))
    windows = random_windows("a", count=21, vocabulary=VOCABULARY, shortest=16, longest=40)
    prompts = prompts_of(windows, ["a"], 21)
    alone = [decoded(model, prompt.tokens[None].astype(np.int64), 12, [])[0] for prompt in prompts]
    made = continuations(model, prompts, 12, [], ranks=Ranks())
    assert [list(each.tokens) for each in made] == alone
    assert not any(each.stopped for each in made)
    end = alone[0][4]
    made = continuations(model, prompts, 12, [end], ranks=Ranks())
    for each, whole in zip(made, alone, strict=True):
        assert list(each.tokens) == (whole[: whole.index(end)] if end in whole else whole)
        assert each.stopped == (end in whole)
        assert each.domain == "a"


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (5, None, [5]), (None, None, []), ([5, 6], None, [5, 6]), (5, {"eos_token_id": [7, 8]}, [7, 8]),
        (5, {"eos_token_id": 7}, [7]), (5, {}, []), (5, {"eos_token_id": None}, []),
    ],
)  # fmt: skip
def test_what_ends_a_text(
    config: object, generation: dict[str, object] | None, expected: list[int], tmp_path: Path
) -> None:
    saved(small_model("mixtral"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": config}))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ends_of(open_subject(str(tmp_path))) == expected
